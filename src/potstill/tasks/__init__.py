"""Where problems come from and how responses are scored.

To add a task, write a class that is a `Task` and add a line to `TASKS`. A class in a file of the
user's own needs no line: `data.source = "my_task.py:MyTask"` names it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from potstill.answers.grading import Grade
from potstill.tasks.benchmarks import BENCHMARKS, make_benchmark
from potstill.tasks.columns import Columns
from potstill.tasks.multiplication import Multiplication
from potstill.tasks.own import OwnTask, own_task
from potstill.tasks.reasoning_gym import ReasoningGym
from potstill.types import Example


class Task(Protocol):
    """A source of problems that can score responses to them.

    A run can make several objects of one class: what `grade` needs is in the examples, and not in
    the object.
    """

    def examples(self, split: str, num_examples: int, seed: int) -> list[Example]:
        """Make `num_examples` problems of a split ("train" or "test"), the same ones for the same
        seed.

        Raises ValueError with one line where there are not so many, or no such split.
        """
        ...

    def grade(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Grade]:
        """Score each response to its example from 0 to 1; 1 is right. An empty response is
        possible."""
        ...

    def answer_end(self, response: str) -> int | None:
        """Say where the first final answer ends (characters), or None; entropy is also reported up
        to there."""
        ...


# By the name before the colon of `data.source`; what follows the colon is the argument.
TASKS: dict[str, Callable[[str | None], Task]] = {
    "multiplication": Multiplication,
    "columns": Columns,
    "reasoning-gym": ReasoningGym,
    **{name: make_benchmark(name) for name in BENCHMARKS},
}


def is_table(source: str | Sequence[str]) -> bool:
    """Whether a data source is of files or hub data sets rather than a task."""
    if own_task(source) is not None:
        return False
    return not isinstance(source, str) or source.partition(":")[0] not in TASKS


def make_task(source: str) -> Task:
    """The task that a data source such as "multiplication", "reasoning-gym:gsm_symbolic" or
    "my_task.py:MyTask" names.

    Raises ValueError, or DataError for a task of the user's own that cannot be used.
    """
    if own_task(source) is not None:
        return OwnTask(source)
    name, _, argument = source.partition(":")
    return TASKS[name](argument or None)
