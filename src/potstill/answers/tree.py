"""The tree of an answer, as the grammar reads it."""

from dataclasses import KW_ONLY, dataclass
from fractions import Fraction


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


class NotUnderstood(ValueError):
    """An answer that the grammar does not cover; such an answer scores nothing."""


@dataclass(frozen=True, slots=True)
class Node:
    """A part of an answer: what it is, a name or sign of its own, a number's value, and its parts
    in their order."""

    kind: str
    name: str = ""
    _: KW_ONLY
    parts: tuple["Node", ...] = ()
    value: Fraction = Fraction(0)


# Kinds of nodes that have a value, as a number or as an expression in variables.
EXPRESSIONS = words(
    "number variable constant sum product quotient power root factorial binomial degree function"
)


def number(value: int | Fraction | str) -> Node:
    """A number's node."""
    return Node("number", value=Fraction(value))


def negative(node: Node) -> Node:
    """A node with the other sign."""
    return number(-node.value) if node.kind == "number" else product(number(-1), node)


def product(a: Node, b: Node) -> Node:
    """The product of two nodes."""
    return Node("product", parts=(a, b))


def difference(a: Node, b: Node) -> Node:
    """The first node less the second."""
    return Node("sum", parts=(a, product(number(-1), b)))


INFINITY = Node("constant", "infty")
MINUS_INFINITY = negative(INFINITY)
REALS = Node("numbers", "reals")


def interval(ends: str, low: Node, high: Node) -> Node:
    """An interval; `ends` are its two brackets."""
    return Node("interval", ends, parts=(low, high))
