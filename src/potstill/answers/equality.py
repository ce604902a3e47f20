"""Whether an answer says what the gold says."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from potstill.answers import units
from potstill.answers.meaning import ALL, FLIPPED
from potstill.answers.tree import (
    EXPRESSIONS,
    INFINITY,
    MINUS_INFINITY,
    REALS,
    Node,
    difference,
    number,
    product,
)
from potstill.answers.values import is_equal, is_positive, points, value_or_none, variables

COLLECTIONS = ("list", "set", "tuple")
# Compared part by part, with their own names.
STRUCTURES = ("matrix", "row", "numbers", "cap", "setminus", "interval", "chain")


def same_answer(gold: Node, answer: Node) -> bool:
    """Whether an answer says what the gold says; a set of one element is that element where no set
    is asked for."""
    if (gold.kind == "set") != (answer.kind == "set"):
        gold, answer = (node.parts[0] if _is_single(node) else node for node in (gold, answer))
    return same(gold, answer)


def _is_single(node: Node) -> bool:
    return node.kind == "set" and len(node.parts) == 1


def same(gold: Node, answer: Node) -> bool:
    """Whether a part of an answer says what that of the gold says; one may name the value that the
    other gives."""
    kinds = (gold.kind, answer.kind)
    if "named" in kinds or "equation" in kinds:
        return _same_equation(gold, answer)
    if "inequality" in kinds:
        if kinds[0] == kinds[1] and gold.name != answer.name:
            return False
        return same(_inner(gold, "inequality"), _inner(answer, "inequality"))
    if "quantity" in kinds:
        return _same_quantity(gold, answer)
    if "text" in kinds:
        return _as_text(gold) == _as_text(answer) is not None
    if any(kind in COLLECTIONS for kind in kinds):
        return _same_collection(_as_tuple(gold), _as_tuple(answer))
    if all(kind in EXPRESSIONS for kind in kinds):
        infinite = (INFINITY, MINUS_INFINITY)
        return gold == answer if gold in infinite or answer in infinite else is_equal(gold, answer)
    if "ratio" in kinds:
        return _same_ratio(gold, answer)
    if kinds == ("union", "union"):
        return _same_unordered(gold.parts, answer.parts)
    if kinds == ("base", "base"):
        return gold == answer
    if "base" in kinds:
        base, other = (gold, answer) if gold.kind == "base" else (answer, gold)
        return base.value == 10 and same(number(base.name), other)
    if {gold, answer} == {ALL, REALS}:
        return True
    is_structure = kinds[0] == kinds[1] and gold.kind in STRUCTURES and gold.name == answer.name
    return is_structure and _same_ordered(gold.parts, answer.parts)


def _inner(node: Node, kind: str) -> Node:
    """The last part of a node of this kind; any other node as it is."""
    return node.parts[-1] if node.kind == kind else node


def _same_equation(gold: Node, answer: Node) -> bool:
    """Named values with one name, a named value and one alone, or equations in one proportion."""
    kinds = {gold.kind, answer.kind}
    if kinds == {"named"}:
        (gold_name, gold_value), (name, value) = gold.parts, answer.parts
        is_one = gold_name == name or (gold_name.kind in EXPRESSIONS and name.kind in EXPRESSIONS)
        return (
            is_one and (gold_name == name or is_equal(gold_name, name)) and same(gold_value, value)
        )
    if "equation" not in kinds:
        return same(_inner(gold, "named"), _inner(answer, "named"))
    if kinds <= {"named", "equation"}:
        return _is_proportional(
            *(replace(each, kind="equation", name=each.name or "=") for each in (gold, answer))
        )
    return False


def _is_proportional(gold: Node, answer: Node) -> bool:
    """Whether the differences of the sides have one ratio everywhere, a positive one where there is
    a direction."""
    if answer.name != gold.name:
        answer = Node("equation", FLIPPED[answer.name], parts=answer.parts[::-1])
    sides = (*gold.parts, *answer.parts)
    if answer.name != gold.name or any(side.kind not in EXPRESSIONS for side in sides):
        return False
    a, b = difference(*gold.parts), difference(*answer.parts)
    names = variables(a)
    if names != variables(b) or not names:
        return False
    first, *others = [(_at(a, point), _at(b, point)) for point in points(names)]
    ratio = value_or_none(Node("quotient", parts=first), {})
    if not ratio or (gold.name not in ("=", "!=") and not is_positive(ratio)):
        return False
    return all(
        is_equal(product(first[0], other[1]), product(other[0], first[1])) for other in others
    )


def _at(node: Node, point: Mapping[str, Fraction]) -> Node:
    """The expression with the values of a point for its variables."""
    if node.kind == "variable":
        return number(point[node.name])
    return replace(node, parts=tuple(_at(part, point) for part in node.parts))


def _same_ordered(a: tuple[Node, ...], b: tuple[Node, ...]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def _same_unordered(a: tuple[Node, ...], b: tuple[Node, ...]) -> bool:
    left = list(b)
    for x in a:
        found = next((i for i, y in enumerate(left) if same(x, y)), None)
        if found is None:
            return False
        left.pop(found)
    return not left


def _distinct(parts: tuple[Node, ...]) -> tuple[Node, ...]:
    kept: list[Node] = []
    for part in parts:
        if not any(same(part, each) for each in kept):
            kept.append(part)
    return tuple(kept)


def _same_collection(gold: Node, answer: Node) -> bool:
    """Sets and lists in any order, tuples in theirs; a list may stand for either, (a, b) for an
    open interval."""
    kinds = {gold.kind, answer.kind}
    if kinds == {"tuple"}:
        return gold.name == answer.name and _same_ordered(gold.parts, answer.parts)
    if kinds == {"tuple", "interval"}:
        pair, span = (gold, answer) if gold.kind == "tuple" else (answer, gold)
        return span.name == (pair.name or "()") and _same_ordered(gold.parts, answer.parts)
    if kinds == {"tuple", "list"}:
        return _same_ordered(_in_order(gold), _in_order(answer))
    if kinds == {"set"}:
        return _same_unordered(_distinct(gold.parts), _distinct(answer.parts))
    if kinds <= {"list", "set"}:
        return _same_unordered(gold.parts, answer.parts)
    return False


def _as_tuple(node: Node) -> Node:
    """A column of a matrix as a tuple; any other node as it is."""
    if (
        node.kind != "matrix"
        or len(node.parts) == 1
        or any(len(row.parts) > 1 for row in node.parts)
    ):
        return node
    return Node("tuple", parts=tuple(row.parts[0] for row in node.parts))


def _in_order(node: Node) -> tuple[Node, ...]:
    """A list's items in the order that a tuple has; of `x = 1, y = 2` the values, where the names
    are sorted."""
    if node.kind == "tuple" or not all(part.kind == "named" for part in node.parts):
        return node.parts
    names = [part.parts[0].name for part in node.parts]
    return tuple(part.parts[1] for part in node.parts) if names == sorted(set(names)) else ()


def _same_quantity(gold: Node, answer: Node) -> bool:
    """Equal numbers whose units, where both have one, are the same."""
    found = [node.name for node in (gold, answer) if node.kind == "quantity"]
    values = _inner(gold, "quantity"), _inner(answer, "quantity")
    if found == ["percent"]:
        return _same_percentage(*(values if gold.kind == "quantity" else values[::-1]))
    return (len(found) == 1 or units.is_same(*found)) and same(*values)


def _same_percentage(percentage: Node, bare: Node) -> bool:
    """A hundredth; or the number itself, above 1, where the question asked for percent."""
    if same(Node("quotient", parts=(percentage, number(100))), bare):
        return True
    size = value_or_none(percentage, {})
    return size is not None and abs(size) > 1 and same(percentage, bare)


def _as_text(node: Node) -> str | None:
    """Words as they are compared; a letter or a product of letters is one too."""
    if node.kind == "text":
        return node.name
    if node.kind in ("variable", "constant"):
        return node.name.lower()
    if node.kind == "product":
        parts = [_as_text(part) for part in node.parts]
        return None if None in parts else "".join(parts)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return None


def _same_ratio(gold: Node, answer: Node) -> bool:
    """Ratios in one proportion; one of two numbers may be a fraction."""
    if gold.kind != answer.kind:
        ratio, other = (gold, answer) if gold.kind == "ratio" else (answer, gold)
        return len(ratio.parts) == 2 and same(Node("quotient", parts=ratio.parts), other)
    if len(gold.parts) != len(answer.parts):
        return False
    first, *others = [
        Node("quotient", parts=pair) for pair in zip(gold.parts, answer.parts, strict=True)
    ]
    return all(is_equal(first, other) for other in others)
