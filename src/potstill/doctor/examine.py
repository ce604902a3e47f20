"""Examination of a recipe on its own models and prompts: nothing is trained, nothing is written."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.checks import models, settings
from potstill.checks.finding import Finding, Subject, Written
from potstill.checks.run import AT_START, guarded, no_number
from potstill.checks.verifier import verifier
from potstill.config import Recipe
from potstill.doctor.speed import speed
from potstill.doctor.writing import write_first_step
from potstill.engines.make import engine_spec, refuse_missing_program
from potstill.models import distributed
from potstill.runs import run_folder
from potstill.training.opening import subject_of
from potstill.training.setup import prepare
from potstill.types import NonFiniteError

OF_SETTINGS: dict[str, Callable[[Subject], Finding]] = {
    "ends": settings.ends,
    "head": models.head,
    "updates": settings.updates,
    "verifier": verifier,
    **AT_START,
}
OF_WRITTEN: dict[str, Callable[[Subject, Written], Finding]] = {
    "loss tokens": models.loss_tokens,
    "window": models.truncation,
    "end masses": models.end_masses,
    "alignment": models.shift,
    "self KL": models.self_kl,
    "start": models.start_kl,
    "vocabulary": models.vocabulary,
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings about one recipe."""

    method: str
    out: str
    findings: Sequence[Finding]
    seconds: float

    @property
    def counts(self) -> Counter[str]:
        return Counter(finding.level for finding in self.findings)

    @property
    def is_fit(self) -> bool:
        """Whether nothing is in the way of a run."""
        return not self.counts["error"]

    @property
    def verdict(self) -> str:
        counts = self.counts
        parts = [
            f"{counts[level]} {word}{'s' if counts[level] > 1 else ''}"
            for level, word in (("error", "error"), ("warning", "warning"))
            if counts[level]
        ]
        if counts["failed"]:
            parts.append(f"{counts['failed']} could not be checked")
        found = ", ".join(parts) or "no fault found"
        advice = "ready to train" if self.is_fit else "mend the errors before you train"
        return f"{found} in {len(self.findings)} checks, {self.seconds:.0f} s: {advice}"

    def as_data(self) -> dict[str, Any]:
        """Plain data, whose keys stay the same from version to version."""
        return {
            "method": self.method,
            "out": self.out,
            "fit": self.is_fit,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 2),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }


def examine(
    recipe: Recipe, tell: Callable[[str], None] = lambda text: None, **objects: Any
) -> Report:
    """Examine a recipe. `tell` hears what is being done.

    `objects` are those of `prepare`: models, a tokenizer and prompts from Python. Raises
    RecipeError, ModelError, DataError or RunError for what a run would refuse as well.
    """
    began = time.perf_counter()
    refuse_missing_program(engine_spec(recipe))
    world = distributed.start()
    run_folder.check_folder(recipe)
    tell("loading models and prompts")
    setup = prepare(recipe, world, **objects)
    is_given = objects.get("prompts") is not None
    subject = dataclasses.replace(subject_of(recipe, setup, world), is_given=is_given)
    setup.student.eval()
    tell("checking settings, models and machine")
    findings = [guarded(name, check, subject) for name, check in OF_SETTINGS.items()]
    try:
        written, clock = write_first_step(recipe, setup, tell)
    except NonFiniteError as error:
        findings.append(no_number("rollouts", error))
    else:
        tell("checking what was written")
        findings += [guarded(name, check, subject, written) for name, check in OF_WRITTEN.items()]
        tell("timing a part of a step")
        findings.append(guarded("speed", speed, recipe, setup, world, written, clock))
    return Report(
        method=recipe.method,
        out=str(recipe.out),
        findings=findings,
        seconds=time.perf_counter() - began,
    )
