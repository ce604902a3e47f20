"""Final answers: read by a strict grammar, compared by exact values.

An answer is understood as a whole or not at all. It is right where it says what the gold says: the
same words, or the same value by `values.py`, which computes exactly, or to more digits than the
expression's largest part needs.
"""

from typing import Literal, NamedTuple

from potstill.answers.equality import same_answer
from potstill.answers.grammar import readings, squeezed
from potstill.answers.meaning import is_name, meaning
from potstill.answers.tree import Node, NotUnderstood

Rule = Literal["same text", "integer", "value", "not understood", "gold not understood"]


class Verdict(NamedTuple):
    """Whether an answer is right, and the rule that decided."""

    is_right: bool
    rule: Rule


def integer(text: str) -> int | None:
    r"""An integer as contests write it, or None: 033, 1,000, 33.0, `33^\circ`, `n = 33`,
    `\frac{66}{2}`, `33 ways`."""
    try:
        node = readings(text)[0]
    except NotUnderstood:
        return None
    if node.kind == "chain" and node.name == "=" and is_name(node.parts[0]):
        node = node.parts[1]
    if node.kind == "quantity" and node.name != "percent":
        node = node.parts[0]
    if (
        node.kind == "quotient"
        and all(part.kind == "number" for part in node.parts)
        and node.parts[1].value
    ):
        over, under = node.parts
        value = over.value / under.value
    elif node.kind == "number":
        value = node.value
    else:
        return None
    return int(value) if value.denominator == 1 else None


def compare(gold: str, answer: str) -> Verdict:
    """Whether an answer in LaTeX is the gold one. What it takes is bounded, though not small for
    every answer."""
    try:
        if squeezed(gold) == squeezed(answer) != "":
            return Verdict(True, "same text")
    except NotUnderstood:
        # A brace that is not closed, on either side.
        pass
    answers = _meanings(answer)
    if not answers:
        return Verdict(False, "not understood")
    golds = _meanings(gold)
    if not golds:
        return Verdict(False, "gold not understood")
    return Verdict(any(same_answer(x, y) for x in golds for y in answers), "value")


def _meanings(text: str) -> list[Node]:
    """The possible meanings of a text: none if not understood, two if its commas can be read in two
    ways."""
    found = []
    try:
        for node in readings(text):
            found.append(meaning(node))
    except NotUnderstood:
        return found
    return found
