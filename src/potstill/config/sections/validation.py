"""The fields of validation: on which prompts a run measures its student as it goes, how often, and
what follows."""

import math
from typing import Annotated, Literal

from pydantic import Field

from potstill.config.roles import Role
from potstill.config.section import Section
from potstill.config.values import MANY, MANY_AT_ONCE

# Quantities of a validation that say which of two students is the better one.
Goal = Literal[
    "teacher_prefix_forward_kl",
    "teacher_prefix_reverse_kl",
    "student_prefix_forward_kl",
    "student_prefix_reverse_kl",
    "student_perplexity",
    "teacher_log_prob",
    "truncation",
    "repetition",
    "score",
]
# Goals that are of the student alone.
WITHOUT_TEACHER: tuple[Goal | None, ...] = (None, "truncation", "repetition", "score")
HIGHER_IS_BETTER: tuple[Goal, ...] = ("teacher_log_prob", "score")


class Validation(Section, role=Role.VALIDATION):
    num_prompts: int | None = Field(default=None, ge=0, le=MANY_AT_ONCE)
    """Prompts that are held out of training, on which both models are measured before the first
    step, between steps and after the last; 0 is off. By default 16 where a live teacher scores
    them, a run is long enough that this takes at most a twentieth of it, and they are no more than
    a twentieth of the data. A task makes more problems instead."""
    source: str | tuple[str, ...] | None = None
    """Where the prompts come from if not from the data: as in data.source, with the same columns
    and template."""
    split: str | None = None
    """Split of a task or hub data set that validation.source names; test by default."""
    every: Annotated[int | None, Role.OUTPUT] = Field(default=None, ge=1, le=MANY)
    """Steps between validations. By default as many as keep within a twentieth of the run, or a
    tenth of its steps where a field of this section is set."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Completion length cap in validation; window.tokens by default."""
    keep_best: Goal | None = None
    """Keep the student of the best validation by this quantity in the run's folder best/."""
    patience: Annotated[int | None, Role.LENGTH] = Field(default=None, ge=1)
    """End the run after so many validations in a row without a better validation.keep_best; never
    by default."""

    @property
    def is_asked_for(self) -> bool:
        """Whether a field asks for validation, and not only the default."""
        return self.num_prompts != 0 and bool(self.model_dump(exclude_none=True))

    def cap(self, window: int) -> int:
        """The most tokens of a completion, in a run with this window."""
        return self.max_tokens or window


# Size of a validation by default: so many prompts, ...
DEFAULT_PROMPTS = 16
# ... at most this part of the run's steps and of the data's prompts, ...
PART = 20
# ... at most so many of them after the first, and so many where they are asked for whatever they
# cost.
MOST, ASKED = 20, 10
# Costs in units of one validation: the teacher writes once; and a step that writes nothing takes a
# fraction of one.
TEACHER_WRITES, NOTHING_WRITTEN = 3, 4


def steps_between(
    validation: Validation, *, num_steps: int, prompts_per_step: int, window: int, writes: bool
) -> int | None:
    """Steps from one validation to the next in a run of so many; None where by default there is
    none.

    It follows from the recipe alone, so that every machine, and a run that goes on, validates after
    the same steps. A validation is taken to cost as much as the step that writes as many tokens,
    but no less than one step: short batches are decoded at the same pace. `writes` says whether
    steps write completions themselves.
    """
    if validation.every is not None:
        return validation.every
    num_prompts = DEFAULT_PROMPTS if validation.num_prompts is None else validation.num_prompts
    longer = validation.cap(window) / window
    in_steps = (
        max(num_prompts / prompts_per_step, 1) * max(longer, 1) * (1 if writes else NOTHING_WRITTEN)
    )
    # The first, which comes before any step, and the teacher's writing are paid for as well.
    num_paid = math.floor(num_steps / PART / in_steps) - 1 - TEACHER_WRITES
    if validation.is_asked_for:
        num_paid = max(num_paid, ASKED)
    return None if num_paid < 1 else math.ceil(num_steps / min(num_paid, MOST))
