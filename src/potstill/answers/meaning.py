r"""The meaning of an answer's form: `x = 5` is a named value, `x < 3` a set, `1 \pm 2` two values,
`2 + 6 = 8` is 8."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from potstill.answers import units
from potstill.answers.tree import (
    EXPRESSIONS,
    INFINITY,
    MINUS_INFINITY,
    REALS,
    Node,
    NotUnderstood,
    interval,
    number,
)
from potstill.answers.values import is_equal, value_or_none, variables

# A relation as seen from its other side.
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
ALL = interval("()", MINUS_INFINITY, INFINITY)


def meaning(node: Node) -> Node:
    """The answer with its relations read and both signs written out. Raises NotUnderstood."""
    if node.kind == "list":
        return _list(node.name, [each for part in node.parts for each in _items(meaning(part))])
    if node.kind == "chain":
        return _relation(node.name.split(), node.parts)
    if node.kind == "set":
        return replace(
            node, parts=tuple(each for part in node.parts for each in _items(meaning(part)))
        )
    if node.kind == "where":
        condition = meaning(node.parts[0])
        if condition.kind != "inequality" or condition.name != node.name:
            raise NotUnderstood("a set whose condition is not solved")
        return condition.parts[0]
    if node.kind in ("cup", "cap", "setminus"):
        return _combined(node.kind, *(meaning(part) for part in node.parts))
    return _both_signs(node)


def _items(node: Node) -> tuple[Node, ...]:
    return node.parts if node.kind == "list" else (node,)


def _list(joint: str, items: list[Node]) -> Node:
    """A list; after `or`, inequalities in one variable are the union of their sets."""
    if joint == "or" and {(item.kind, item.name) for item in items} == {
        ("inequality", items[0].name)
    }:
        pieces = tuple(piece for item in items for piece in _pieces(item.parts[0]))
        return Node("inequality", items[0].name, parts=(Node("union", parts=pieces),))
    return Node("list", joint, parts=tuple(items))


def _signs(node: Node) -> list[str]:
    return [node.kind] * (node.kind in ("pm", "mp")) + [
        sign for part in node.parts for sign in _signs(part)
    ]


def _both_signs(node: Node) -> Node:
    """A list of the values for the upper and the lower signs, where there are both; else the
    node."""
    signs = _signs(node)
    if not signs:
        return node
    if signs.count("pm") > 1 or not (
        node.kind in EXPRESSIONS or node.kind in ("quantity", "tuple", "pm", "mp")
    ):
        raise NotUnderstood("signs that may be independent")
    return Node("list", parts=(_with_sign(node, "pm"), _with_sign(node, "mp")))


def _with_sign(node: Node, plus: str) -> Node:
    parts = tuple(_with_sign(part, plus) for part in node.parts)
    if node.kind not in ("pm", "mp"):
        return replace(node, parts=parts)
    return parts[0] if node.kind == plus else Node("product", parts=(number(-1), *parts))


def is_name(node: Node) -> bool:
    """Whether the left side of an equation only says what stands on the right: x, f(x), AB, m + n,
    `area`, (x, y)."""
    if node.kind == "text":
        return not units.DOUBTS & set(node.name.split())
    if node.kind == "variable":
        return True
    if node.kind in ("tuple", "list", "sum"):
        return all(is_name(part) for part in node.parts)
    if node.kind == "power":
        return node.parts[0].kind == "variable" and node.parts[1] == number(-1)
    if node.kind == "product":
        first, *others = node.parts
        return is_name(first) and all(is_name(part) or part.kind == "number" for part in others)
    return False


def _relation(names: list[str], parts: tuple[Node, ...]) -> Node:
    """A named value, the value of a true equation, the set of an inequality, an equation, or a
    chain."""
    if any(_signs(part) for part in parts[:-1]):
        raise NotUnderstood("both signs on the left")
    if names == ["in"] and parts[0].kind == "variable":
        return Node("inequality", parts[0].name, parts=(meaning(parts[1]),))
    if set(names) == {"="}:
        return _equation(parts)
    if (found := _solved(names, parts)) is not None:
        return found
    return Node(
        "equation" if len(names) == 1 and names != ["in"] else "chain", " ".join(names), parts=parts
    )


def _equation(parts: tuple[Node, ...]) -> Node:
    """The last side where the others only name it or equal it; else an equation of two sides."""
    last = meaning(parts[-1])
    start = 1 if is_name(parts[0]) else 0
    values = [part.parts[0] if part.kind == "quantity" else part for part in parts[start:]]
    if all(value.kind in EXPRESSIONS and is_equal(value, values[-1]) for value in values[:-1]):
        if start:
            named = tuple(Node("named", parts=(parts[0], item)) for item in _items(last))
            return Node("list", last.name, parts=named) if last.kind == "list" else named[0]
        if not any(variables(part) for part in parts):
            return last
    if len(parts) > 2:
        raise NotUnderstood("sides that are not equal")
    return Node("equation", "=", parts=parts)


def _solved(names: list[str], parts: tuple[Node, ...]) -> Node | None:
    """The set of one variable between constants, or None."""
    places = [i for i, part in enumerate(parts) if part.kind == "variable"]
    bounds = [part for i, part in enumerate(parts) if i not in places]
    if len(places) != 1 or len(parts) > 3 or not set(names) <= set(FLIPPED) - {"="}:
        return None
    if any(bound.kind not in EXPRESSIONS or variables(bound) for bound in bounds):
        return None
    name, place = parts[places[0]].name, places[0]
    if names == ["!="]:
        pieces = interval("()", MINUS_INFINITY, bounds[0]), interval("()", bounds[0], INFINITY)
        return Node("inequality", name, parts=(Node("union", parts=pieces),))
    # As seen from the variable.
    signs = [FLIPPED[sign] if i < place else sign for i, sign in enumerate(names)]
    if (
        "!=" in signs
        or len({sign[0] for sign in signs}) != len(signs)
        or (len(parts) == 3 and place != 1)
    ):
        return None
    low, high, left, right = MINUS_INFINITY, INFINITY, "(", ")"
    for sign, bound in zip(signs, bounds, strict=True):
        if sign[0] == ">":
            low, left = bound, "[" if "=" in sign else "("
        else:
            high, right = bound, "]" if "=" in sign else ")"
    return Node("inequality", name, parts=(interval(left + right, low, high),))


def _combined(name: str, left: Node, right: Node) -> Node:
    """A union as its pieces; the reals without some numbers as intervals; else as it is."""
    if name == "cup":
        return Node("union", parts=(*_pieces(left), *_pieces(right)))
    if name == "setminus" and left in (REALS, ALL) and right.kind == "set":
        values = {part: value_or_none(part, {}) for part in right.parts}
        if all(isinstance(value, Fraction) for value in values.values()):
            ends = [MINUS_INFINITY, *sorted(values, key=lambda part: values[part]), INFINITY]  # pyright: ignore
            return Node("union", parts=tuple(interval("()", *pair) for pair in pairwise(ends)))
    return Node(name, parts=(left, right))


def _pieces(node: Node) -> tuple[Node, ...]:
    """The parts of a union; a pair in parentheses is an open interval here."""
    if node.kind == "tuple" and len(node.parts) == 2 and not node.name:
        return (interval("()", *node.parts),)
    return node.parts if node.kind == "union" else (node,)
