"""Mathematics problems by name: gsm8k, math500, amc23, aime24, deepscaler; from the hub or a file:
`gsm8k:FILE`.

A local file has the columns of the hub's data set. Only the last closed box of a response counts,
compared with the gold answer in processes with a time limit (`potstill.answers.grading`).
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from potstill.answers.boxes import box_end
from potstill.answers.grading import AnswerKind, Grade, Grader, gsm8k_gold
from potstill.tasks.tables import DATA_SUFFIXES, DataRow, read_table_rows, with_own_ids
from potstill.types import Example

# Columns that may name a problem; the first that a row has does.
IDS = ("unique_id", "id", "ID")
BOX_INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


class Benchmark(NamedTuple):
    """Where a benchmark is and how its rows are read. Several names of a column: those of its
    copies on the hub."""

    hub_id: str
    config: str | None
    split: str
    problem: tuple[str, ...]
    answer: tuple[str, ...]
    gold: Callable[[str], str]
    kind: AnswerKind
    level: str | None = None


def _integer_gold(answer: str) -> str:
    """An AIME answer as it is. Raises ValueError for what is no integer."""
    from potstill.answers import integer

    if integer(answer) is None:
        raise ValueError(f"an AIME answer is an integer, and this one is not: {answer!r}")
    return answer


BENCHMARKS = {
    "gsm8k": Benchmark(
        "openai/gsm8k", "main", "test", ("question",), ("answer",), gsm8k_gold, "latex"
    ),
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500", None, "test", ("problem",), ("answer",), str, "latex", "level"
    ),
    "amc23": Benchmark(
        "math-ai/amc23", None, "test", ("question", "problem"), ("answer",), str, "latex"
    ),
    "aime24": Benchmark(
        "HuggingFaceH4/aime_2024",
        None,
        "train",
        ("problem", "Problem"),
        ("answer", "Answer"),
        _integer_gold,
        "integer",
    ),
    # To train on: 40,000 problems with answers.
    "deepscaler": Benchmark(
        "agentica-org/DeepScaleR-Preview-Dataset",
        None,
        "train",
        ("problem",),
        ("answer",),
        str,
        "latex",
    ),
}


@cache
def _grader() -> Grader:
    """One set of workers for the process; they end with it."""
    import atexit

    grader = Grader()
    atexit.register(grader.close)
    return grader


class MathBenchmark:
    """One of BENCHMARKS, for `evaluation.source`, and for `data.source` where it is there to train
    on."""

    def __init__(self, name: str, file: str | None = None):
        self.name, self.file, self.spec = name, file, BENCHMARKS[name]

    def examples(self, split: str, num_examples: int, seed: int) -> list[Example]:
        """The first problems, in the data set's order; it has one split for evaluation, and no
        seed."""
        spec = self.spec
        columns = [*spec.problem, *spec.answer, *IDS, *([] if spec.level is None else [spec.level])]
        source = self.file or spec.hub_id
        rows = read_table_rows(
            source, columns, num_rows=num_examples, split=spec.split, config=spec.config
        )
        if num_examples > len(rows):
            raise ValueError(
                f"{num_examples} problems are asked for and it has {len(rows)}; ask for at most "
                "that many"
            )
        return with_own_ids([self._example(row, i) for i, row in enumerate(rows)])

    def _example(self, row: DataRow, i: int) -> Example:
        spec, values = self.spec, row.values
        problem = next((values[name] for name in spec.problem if name in values), None)
        answer = next((values[name] for name in spec.answer if name in values), None)
        if not isinstance(problem, str) or answer is None:
            raise ValueError(
                f"{row.where} has the columns {', '.join(sorted(row.names))}; {self.name} needs "
                f"{spec.problem[0]!r} and {spec.answer[0]!r}, the first a text and neither of "
                "them null"
            )
        try:
            gold = spec.gold(str(answer))
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        level = values.get(spec.level, "") if spec.level is not None else ""
        return Example(
            id=str(next((values[name] for name in IDS if name in values), i)),
            prompt=problem + BOX_INSTRUCTION,
            answer=gold,
            level=f"level {level}" if level != "" else "",
        )

    def grade(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Grade]:
        """The last closed box of each response against its gold."""
        return _grader().grade(
            [example.answer or "" for example in examples], responses, self.spec.kind
        )

    def answer_end(self, response: str) -> int | None:
        """Just after the first closed box."""
        return box_end(response)


def make_benchmark(name: str) -> Callable[[str | None], MathBenchmark]:
    """The maker of a benchmark for `TASKS`; it takes what follows the colon, a local file."""

    def make(file: str | None) -> MathBenchmark:
        if file is not None and not Path(file).is_file():
            raise ValueError(
                f"{name}: file {file!r} does not exist; give a file ({', '.join(DATA_SUFFIXES)}) "
                "in its schema"
            )
        return MathBenchmark(name, file)

    return make
