"""Where problems come from and how responses are scored.

A task has `examples(split, num_examples, seed)`, `score(example, response)` in [0, 1], and `answer_end(response)`, the
end of the first final answer (characters) or None. To add one, write a class and add a line to `TASKS`.
"""

from collections.abc import Callable
from typing import Protocol

from potstill.tasks.columns import Columns
from potstill.tasks.multiplication import Multiplication
from potstill.tasks.reasoning_gym import ReasoningGym
from potstill.types import Example


class Task(Protocol):
    def examples(self, split: str, num_examples: int, seed: int) -> list[Example]: ...

    def score(self, example: Example, response: str) -> float: ...

    def answer_end(self, response: str) -> int | None: ...


# By the name before the colon of `data.source`; what follows the colon is the argument.
TASKS: dict[str, Callable[[str | None], Task]] = {
    "multiplication": Multiplication,
    "columns": Columns,
    "reasoning-gym": ReasoningGym,
}


def make_task(source: str) -> Task:
    """The task that a data source such as "multiplication" or "reasoning-gym:gsm_symbolic" names."""
    name, _, argument = source.partition(":")
    return TASKS[name](argument or None)
