"""The paper's claims, judged by runs that can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from potstill.results import Entry
from potstill.statistics import Estimate


@dataclass(frozen=True)
class Claim:
    """One claim, the effect that was measured with its interval, and what follows."""

    name: str
    statement: str
    metric: str
    effect: Estimate | None
    unit: str
    pairs: tuple[tuple[Path, Path], ...]
    verdict: Literal["supported", "contradicted", "undecided", "not measured"]
    detail: str


def claims(entries: Sequence[Entry]) -> list[Claim]:
    """The claims that these entries can be asked about."""
    return []
