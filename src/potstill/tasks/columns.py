"""Constructed settings of column multiplication, in which the teacher knows something that the
student cannot read.

A problem is a number of four or five digits times one digit; a response goes through the columns
and gives the answer, `7*6=42+0=42|4*6+4=28|:20|...#20682.`. Each column is written in one of three
styles: in full `7*6=42+0=42`, in half `7*6+0=42`, or from the head `:42`. The teacher's prompt
begins with a tag that says how it writes; the student's begins with `_` whatever the tag. One
character is one token, as in the task multiplication.

Each setting has one mechanism, so what a run shows here is about that mechanism and not about
language models at large.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from potstill.answers.grading import Grade
from potstill.tasks.multiplication import ANSWER, is_test_problem
from potstill.types import Example

COLUMN_DIGITS = (4, 5)
FULL, HALF, HEAD = "full", "half", "head"


@dataclass(frozen=True)
class Behaviour:
    """How the teacher writes under a tag: shares of the styles (of columns, or of whole responses)
    and first carry."""

    styles: dict[str, float]
    whole: bool = False
    carry: int = 0


# By tag. `|` is another convention: the carry begins with 1, so the right answer is the product
# plus 1.
BEHAVIOURS = {
    "_": Behaviour({FULL: 0.4, HALF: 0.3, HEAD: 0.3}),
    "|": Behaviour({FULL: 0.4, HALF: 0.3, HEAD: 0.3}, carry=1),
    "~": Behaviour({FULL: 0.5, HALF: 0.5}),
    "?": Behaviour({HALF: 0.5, HEAD: 0.5}),
    ":": Behaviour({FULL: 0.5, HEAD: 0.5}, whole=True),
}
# By setting: how often each tag comes. `visible` is for training the teacher: the student's prompt
# has the tag too.
SETTINGS = {
    "plain": {"_": 1.0},
    "hidden-convention": {"_": 0.65, "|": 0.35},
    "even-convention": {"_": 0.5, "|": 0.5},
    "certain-convention": {"|": 1.0},
    "hidden-style": {"~": 0.5, "?": 0.5},
    "both-hidden": {"~": 0.325, "?": 0.325, "|": 0.35},
    "two-algorithms": {":": 1.0},
    "visible": dict.fromkeys(BEHAVIOURS, 0.2),
}


def write_response(rng: random.Random, behaviour: Behaviour, a: int, b: int) -> str:
    """A right response, column by column from the last digit."""
    names, shares = list(behaviour.styles), list(behaviour.styles.values())
    num_columns = len(str(a))
    drawn = rng.choices(names, shares, k=1 if behaviour.whole else num_columns)
    styles = drawn * num_columns if behaviour.whole else drawn
    carry, answer, columns = behaviour.carry, "", []
    for digit, style in zip(reversed(str(a)), styles, strict=True):
        product = int(digit) * b
        result = product + carry
        columns.append(
            {
                FULL: f"{digit}*{b}={product:02d}+{carry}={result:02d}",
                HALF: f"{digit}*{b}+{carry}={result:02d}",
                HEAD: f":{result:02d}",
            }[style]
        )
        carry, answer = result // 10, f"{result % 10}{answer}"
    return "|".join(columns) + f"|#{carry or ''}{answer}."


class Columns:
    """The task for `data.source = "columns:SETTING"`."""

    def __init__(self, setting: str | None = None):
        setting = setting or "plain"
        if setting not in SETTINGS:
            raise ValueError(
                f"columns has no setting {setting!r}; choose one of {sorted(SETTINGS)}"
            )
        self.setting = setting

    def examples(self, split: str, num_examples: int, seed: int) -> list[Example]:
        """Problems of the split with the teacher's kind of response, four and five digits in
        turn."""
        if split not in ("train", "test"):
            raise ValueError(f'columns has no split {split!r}; choose "train" or "test"')
        rng = random.Random(f"columns/{self.setting}/{split}/{seed}")
        tags, shares = list(SETTINGS[self.setting]), list(SETTINGS[self.setting].values())
        examples: list[Example] = []
        while len(examples) < num_examples:
            num_digits = COLUMN_DIGITS[len(examples) % len(COLUMN_DIGITS)]
            a, b = rng.randrange(10 ** (num_digits - 1), 10**num_digits), rng.randint(2, 9)
            if is_test_problem(a, b) != (split == "test"):
                continue
            (tag,) = rng.choices(tags, shares)
            problem = f"{a:_>5}*{b}="
            is_visible = self.setting == "visible"
            examples.append(
                Example(
                    id=f"{split}-{len(examples)}",
                    prompt=(tag if is_visible else "_") + problem,
                    completion=((write_response(rng, BEHAVIOURS[tag], a, b), True),),
                    answer=str(a * b + BEHAVIOURS[tag].carry),
                    level=f"{num_digits} digits",
                    teacher_prompt=None if is_visible else tag + problem,
                )
            )
        return examples

    def grade(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Grade]:
        """1 when the last `#digits` of the response is the answer, else 0."""
        given = [(ANSWER.findall(response) or [None])[-1] for response in responses]
        return [
            Grade(float(a == example.answer), a) for example, a in zip(examples, given, strict=True)
        ]

    def answer_end(self, response: str) -> int | None:
        """Where the first finished answer ends (characters), or None."""
        match = ANSWER.search(response)
        return match.end() + 1 if match and response[match.end() : match.end() + 1] == "." else None
