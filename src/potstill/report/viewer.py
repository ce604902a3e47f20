"""The data of the report's rollout reader: the first and last rollouts of runs. Opens no file;
needs no torch."""

import math
from collections.abc import Sequence
from typing import Any

from potstill.runs.results import Entry
from potstill.runs.schema import ChoicesName, SampleRow, TokenNumber, value_in

# Numbers that tokens can be coloured by, and their names in the reader; loss comes last, for the
# run defines it.
COLOURINGS: dict[TokenNumber, str] = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "student_entropy": "student entropy",
    "teacher_entropy": "teacher entropy",
    "loss": "loss",
}
CHOICES: tuple[ChoicesName, ...] = ("teacher_choices", "student_choices")
# The share of a run's numbers that lies within its colour scale; a few large ones would pale all
# others.
SCALE_SHARE = 0.95
# The most tokens that one page may hold: about 4 MB, packed some 1 MB.
MAX_TOKENS = 12_000


def reader_data(entries: Sequence[Entry], max_tokens: int = MAX_TOKENS) -> list[dict[str, Any]]:
    """Data for the page's script: for each run with logged rollouts those of its first and last
    logged step.

    A run has `name`, `path`, `num_steps` (how many logged steps there are), `numbers` (name and
    label of each it has), `scale` (the value in nats at which each has its full colour) and
    `rollouts`, which hold what `samples.logged_sample` made, with `num_tokens` of the whole
    completion. Where all of them together have more than `max_tokens` tokens, the longest are cut
    to one length, and `num_tokens` tells. Numbers that are not finite become strings: JSON has
    none.
    """
    runs = [(entry, _ends(entry.samples)) for entry in entries if entry.samples]
    limit = _fair_limit(
        [len(sample["tokens"]) for _, samples in runs for sample in samples], max_tokens
    )
    return [_run(entry, [_cut(sample, limit) for sample in samples]) for entry, samples in runs]


def _ends(samples: Sequence[SampleRow]) -> list[SampleRow]:
    """The rollouts of the first and the last step."""
    steps = (samples[0]["step"], samples[-1]["step"])
    return [sample for sample in samples if sample["step"] in steps]


def _fair_limit(lengths: Sequence[int], total: int) -> int:
    """The longest that a rollout may be for all of them, cut to it, to have at most `total`
    tokens."""
    left = total
    for i, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - i)
        if length > share:
            return share
        left -= length
    return max(lengths, default=0)


def _cut(sample: SampleRow, limit: int) -> dict[str, Any]:
    """The first `limit` tokens of a sample, and their numbers."""
    trained = sample["trained"][:limit]
    num = sum(trained)
    cut: dict[str, Any] = {
        "tokens": sample["tokens"][:limit],
        "trained": trained,
        "num_tokens": len(sample["tokens"]),
    }
    for name in COLOURINGS:
        values = value_in(sample, name)
        if values is not None:
            cut[name] = [x if math.isfinite(x) else str(x) for x in values[:num]]
    for name in CHOICES:
        choices = value_in(sample, name)
        if choices is not None:
            cut[name] = choices[:num]
    return {**sample, **cut}


def _run(entry: Entry, rollouts: list[dict[str, Any]]) -> dict[str, Any]:
    numbers: dict[TokenNumber, list[float | str]] = {
        name: [x for r in rollouts for x in r.get(name, ())] for name in COLOURINGS
    }
    names: list[TokenNumber] = [name for name, values in numbers.items() if values]
    return {
        "name": entry.name,
        "path": str(entry.path),
        "num_steps": len({sample["step"] for sample in entry.samples}),
        "numbers": [[name, COLOURINGS[name]] for name in names],
        "scale": {name: _scale(numbers[name]) for name in names},
        "rollouts": rollouts,
    }


def _scale(values: Sequence[float | str]) -> float:
    """The next of 1, 2, 5, 10, ... (times a power of ten, from 0.01) above most of the values."""
    ordered = sorted(x for x in values if not isinstance(x, str))
    most = max(ordered[math.ceil(SCALE_SHARE * len(ordered)) - 1], 0.01) if ordered else 0.01
    power = 10.0 ** math.floor(math.log10(most))
    return next(round(step * power, 10) for step in (1, 2, 5, 10) if step * power >= most)
