"""Where problems come from and how responses are scored.

A task has `examples(split, num_examples, seed)`, `grade(examples, responses)`, and `answer_end(response)`, the end of
the first final answer (characters) or None. To add one, write a class and add a line to `TASKS`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from potstill.grading import Grade
from potstill.tasks.benchmarks import BENCHMARKS, make_benchmark
from potstill.tasks.columns import Columns
from potstill.tasks.multiplication import Multiplication
from potstill.tasks.reasoning_gym import ReasoningGym
from potstill.types import Example


class Task(Protocol):
    def examples(self, split: str, num_examples: int, seed: int) -> list[Example]: ...

    def grade(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Grade]: ...

    def answer_end(self, response: str) -> int | None: ...


# By the name before the colon of `data.source`; what follows the colon is the argument.
TASKS: dict[str, Callable[[str | None], Task]] = {
    "multiplication": Multiplication,
    "columns": Columns,
    "reasoning-gym": ReasoningGym,
    **{name: make_benchmark(name) for name in BENCHMARKS},
}


def is_table(source: str | Sequence[str]) -> bool:
    """Whether a data source is of files or hub data sets rather than a task."""
    return not isinstance(source, str) or source.partition(":")[0] not in TASKS


def make_task(source: str) -> Task:
    """The task that a data source such as "multiplication" or "reasoning-gym:gsm_symbolic" names."""
    name, _, argument = source.partition(":")
    return TASKS[name](argument or None)
