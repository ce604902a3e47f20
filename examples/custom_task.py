"""A task of your own: a class in a file, which a recipe names as `data.source =
"examples/custom_task.py:Nines"`.

potstill train examples/custom_task.toml

The class needs no base class and no registration, only these three methods. Its file is run from
its text alone, so it may import what is installed but not the files beside it.
"""

import random
import re

from potstill import Example, Grade


class Nines:
    """Products with nine, written as the shipped models read and write them."""

    def examples(self, split: str, num_examples: int, seed: int) -> list[Example]:
        """Problems of a split, the same ones for the same seed. Multiples of seven are held out for
        "test"."""
        rng = random.Random(f"nines/{split}/{seed}")
        examples = []
        while len(examples) < num_examples:
            number = rng.randrange(10, 10_000)
            if (number % 7 == 0) != (split == "test"):
                continue
            examples.append(
                Example(
                    id=f"{split}-{len(examples)}",
                    prompt=f"{number:_>4}*9=",
                    answer=str(9 * number),
                    level=f"{len(str(number))} digits",
                )
            )
        return examples

    def grade(self, examples: list[Example], responses: list[str]) -> list[Grade]:
        """1 for a response whose last `#digits` is the product, else 0. Any score between is
        possible."""
        grades = []
        for example, response in zip(examples, responses, strict=True):
            answers = re.findall(r"#(\d+)", response)
            given = answers[-1] if answers else None
            grades.append(Grade(score=float(given == example.answer), answer=given))
        return grades

    def answer_end(self, response: str) -> int | None:
        """Just after the first finished answer, such as `#2082.`; entropy is also reported up to
        there."""
        found = re.search(r"#\d+\.", response)
        return found.end() if found else None
