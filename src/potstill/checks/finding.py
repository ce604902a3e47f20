"""Finding of a check, and the subject that all checks look at."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from potstill.config import Recipe
from potstill.models.language_model import LanguageModel
from potstill.objectives.loss import Loss
from potstill.rollouts.batching import make_batch
from potstill.teachers.ends import Ends
from potstill.teachers.protocol import Teacher
from potstill.types import Prompt, Rollout

# skipped: there is nothing to check; failed: the check itself could not be done.
Level = Literal["ok", "warning", "error", "skipped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check's result: how grave, in words, what to do, and the numbers behind it.

    `check` names the check, and it and the keys of `measured` stay the same from version to
    version.
    """

    check: str
    level: Level
    says: str
    fix: str = ""
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """All that a run is about to use, loaded and tokenised.

    `lr` is the peak learning rate, and `usual_lr` that of most students of this size. Where
    `is_given`, the prompts come from Python, and not from `data.source`.
    """

    recipe: Recipe
    student: LanguageModel
    teacher: Teacher | None
    prompts: Sequence[Prompt]
    ends: Ends
    loss: Loss
    lr: float
    usual_lr: float
    date: str
    device: torch.device
    is_given: bool = False

    def models(self) -> dict[str, LanguageModel]:
        """The models whose bodies are loaded, by their part in the run."""
        found = {"student": self.student}
        if isinstance(self.teacher, LanguageModel):
            found["teacher"] = self.teacher
        return found

    def batch_of(self, rollouts: Sequence[Rollout]):
        return make_batch(list(rollouts), self.device)


@dataclass(frozen=True, kw_only=True)
class Written:
    """Rollouts to the prompts of the first step.

    `step` are those that the recipe trains on, `student` and `teacher` what each model writes by
    itself (none of a teacher that cannot write). All have at most `window` tokens; where time was
    short that is less than the recipe's, and `is_whole` is false. `known` keeps what one check has
    computed for others, by its name.
    """

    step: Sequence[Rollout]
    student: Sequence[Rollout]
    teacher: Sequence[Rollout]
    window: int
    is_whole: bool
    known: dict[str, Any] = field(default_factory=dict)
