r"""The strict grammar of final answers: what an answer says, as a tree, or NotUnderstood.

Each token has a place in the tree, or the answer is refused: `4+`, `4x(`, `5 \quad 6`, `4 \to 5`,
`1, 2, \ldots, n`. Nothing is dropped, and what stands side by side is a product, a mixed number,
digit groups or a mistake, never a sum.
"""

import re
from dataclasses import replace
from fractions import Fraction

from potstill.answers import units
from potstill.answers.atoms import SYMBOLS, Atoms
from potstill.answers.tokens import FUNCTIONS, Token, normalise, tokens, with_digit_groups
from potstill.answers.tree import Node, NotUnderstood, negative, number, product

RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "in": "in"}
CURRENCIES = ("$", "euro", "pounds", "yen", "rupee")
FACTORS = {"frac", "sqrt", "binom", "lfloor", "lceil", *SYMBOLS, *FUNCTIONS}


def readings(text: str) -> list[Node]:
    """The readings of an answer: its commas part groups of three digits where they can, or items of
    a list.

    Raises NotUnderstood where it says nothing by the grammar.
    """
    plain = normalise(text)
    grouped = with_digit_groups(plain)
    texts = [grouped]
    # A group that begins with 0 is no item of a list.
    if grouped != plain and not re.search(r"\d,0\d\d(?!\d)", plain):
        texts.append(plain)
    return [Reader(tokens(each)).answer() for each in texts]


def squeezed(text: str) -> str:
    """The answer's tokens as one string, for answers that are compared as they are written. Raises
    NotUnderstood."""
    found = tokens(with_digit_groups(normalise(text)))
    return " ".join(
        token.text.lower() if token.kind == "word" else token.text for token in found
    ).strip()


class Reader(Atoms):
    """Factors, products, sums, sets, values with units, relations, lists."""

    def answer(self) -> Node:
        """The whole answer."""
        words = [
            token.text.lower() for token in self.tokens[:-1] if token.kind in ("word", "letter")
        ]
        is_text = len(words) == len(self.tokens) - 1 and not {"and", "or"} & set(words)
        if is_text and any(token.kind == "word" and len(token.text) > 1 for token in self.tokens):
            return Node("text", " ".join(words))
        self.take("=")
        node = self.listed()
        if self.next.kind != "end":
            raise NotUnderstood(f"what stands from {self.next.text!r} on")
        return node

    def listed(self) -> Node:
        """Items parted by commas, semicolons, `and` or `or`; a list, or the only one."""
        items, joints = [self.item()], set()
        while joint := self.take(",", ";", "lor", "land") or self.take_word("and", "or"):
            last = (joint.text == "," and self.take_word("and", "or")) or joint
            joints.add({"lor": "or", "land": "and"}.get(last.text, last.text.lower()))
            items.append(self.item())
        name = "or" if "or" in joints else "and" if "and" in joints else ""
        return items[0] if len(items) == 1 else Node("list", name, parts=tuple(items))

    def item(self) -> Node:
        """A value, a ratio, or a chain of relations."""
        parts, names = [self.side()], []
        while self.next.text in RELATIONS and self.next.kind in ("sign", "macro"):
            sign = RELATIONS[self.next.text]
            self.place += 1
            names.append(sign + "=" if sign in "<>" and self.take("=") else sign)
            parts.append(self.side())
        if names:
            return Node("chain", " ".join(names), parts=tuple(parts))
        while self.take(":"):
            parts.append(self.side())
        if len(parts) == 2 and parts[0].kind == "text":
            return Node("chain", "=", parts=tuple(parts))
        return Node("ratio", parts=tuple(parts)) if len(parts) > 1 else parts[0]

    def side(self) -> Node:
        """Words, a set, or a value with its unit."""
        if words := self.words():
            return words
        currency = self.take(*CURRENCIES)
        minus = self.take("-") if currency else None
        node = self.union()
        node = negative(node) if minus else node
        while times := self.take_word(*units.TIMES):
            node = product(node, number(units.TIMES[times.text.lower()]))
        unit = self.unit([units.UNIT_NAMES.get(currency.text, currency.text)] if currency else [])
        return Node("quantity", unit, parts=(node,)) if unit else _without_degrees(node)

    def words(self) -> Node | None:
        """Words that are all of an item or side; None, and nothing read, where there are none."""
        start = self.place
        while self.next.kind == "word" and not self.is_word("and", "or"):
            self.place += 1
        found = [token.text.lower() for token in self.tokens[start : self.place]]
        is_name = len(found) == 1 and len(found[0]) == 1
        is_end = self.next.kind == "end" or self.is_word("and", "or") or self.is_next(*"=:,;})]&\\")
        if found and is_end and not is_name:
            return Node("text", " ".join(found))
        self.place = start
        return None

    def unit(self, names: list[str]) -> str:
        """The unit's name after a value, of which a currency may be known: a sign, or words, powers
        and a `per`."""
        if not names and (sign := self.take("%", *CURRENCIES)):
            return units.UNIT_NAMES.get(sign.text, sign.text)
        if self.take("frac"):
            return f"{self.unit_in_braces()} /{self.unit_in_braces()}"
        over = ""
        while self.next.kind == "word" and not self.is_word("or", "and"):
            word = self.next.text
            self.place += 1
            self.take(".")
            if names and word.lower() in units.JOINTS:
                over = "/" if word.lower() in units.PER else over
                continue
            power = f"^{self.whole_power()}" if self.take("^") else ""
            name = units.unit(word)
            if [name] != names:
                names.append(name if name in units.POWERS else over + name + power)
            over = "/" if self.take("/") else ""
        if over:
            raise NotUnderstood("a unit per nothing")
        return units.joined(names) if names else ""

    def unit_in_braces(self) -> str:
        """The unit above or below a fraction's bar."""
        self.need("{")
        name = self.unit([])
        self.need("}")
        if not name:
            raise NotUnderstood("a fraction with a unit and none")
        return name

    def whole_power(self) -> str:
        """The power of a unit."""
        power = self.script()
        if power.kind != "number" or power.value not in range(-9, 10):
            raise NotUnderstood("the power of a unit")
        return str(power.value)

    def union(self) -> Node:
        """Sets joined by union, intersection or difference; or a sum."""
        node = self.sum()
        while True:
            is_letter = (
                self.next.kind == "letter"
                and self.is_next("U")
                and node.kind in ("interval", "tuple")
            )
            if not is_letter and not (
                self.next.kind == "macro" and self.is_next("cup", "cap", "setminus")
            ):
                return node
            name = "cup" if is_letter else self.next.text
            self.place += 1
            node = Node(name, parts=(node, self.sum()))

    def element(self) -> Node:
        """An item of a tuple, set or matrix: words, or a value without a relation."""
        return self.words() or _without_degrees(self.union())

    def sum(self) -> Node:
        """Terms with their signs."""
        terms = []
        sign = self.take("+", "-", "pm", "mp")
        while sign or not terms:
            term = self.term()
            if sign and sign.text != "+":
                term = negative(term) if sign.text == "-" else Node(sign.text, parts=(term,))
            terms.append(term)
            sign = self.take("+", "-", "pm", "mp")
        return terms[0] if len(terms) == 1 else Node("sum", parts=tuple(terms))

    def argument(self) -> Node:
        """A function's argument without brackets: factors side by side, up to the next function."""
        self.deeper()
        minus = self.take("-")
        node = self.term(is_argument=True)
        self.depth -= 1
        return negative(node) if minus else node

    def term(self, is_argument: bool = False) -> Node:
        """Factors with signs between them, or side by side."""
        node = self.postfixed()
        is_literal, is_below = self.last.kind == "number", False
        while True:
            sign = None if is_argument else self.take("cdot", "*", "/", "div")
            if sign:
                minus = self.take("-")
                factor = self.postfixed()
                is_digits = self.last.kind == "number" and factor.kind == "number"
                divides = sign.text in ("/", "div")
                # 1/2 x is a half of x; of 1/a x nobody knows.
                is_below = divides and not (is_digits and is_literal)
                is_literal = is_digits and not divides
                factor = negative(factor) if minus else factor
                node = Node("quotient", parts=(node, factor)) if divides else product(node, factor)
            elif not self.begins_factor() or (is_argument and self.is_next(*FUNCTIONS)):
                return node
            elif is_literal and (mixed := self.mixed(node)):
                node, is_literal = mixed, False
            elif (
                self.next.gap > 1
                or is_below
                or self.begins_with_digit()
                or self.are_fractions(node)
            ):
                raise NotUnderstood(f"{self.next.text!r} beside what stands before it")
            else:
                node, is_literal = product(node, self.postfixed()), False

    def begins_factor(self) -> bool:
        """Whether the next token begins a factor that needs no sign before it."""
        token = self.next
        if token.kind == "macro":
            return token.text in FACTORS and not (token.text == "frac" and _is_unit(self.ahead(2)))
        if token.kind == "word":
            return len(token.text) == 1 and not _is_unit(token)
        if token.kind == "letter":
            return token.text != "U" or self.ahead(1).text not in ("(", "[")
        return (
            token.kind == "number"
            or self.is_next("(", "[", "{")
            or (self.is_next("|") and not self.num_bars)
        )

    def begins_with_digit(self) -> bool:
        """Whether the next factor, drawn, begins with a digit."""
        place = self.place
        while self.tokens[place].text == "{":
            place += 1
        return self.tokens[place].kind == "number"

    def are_fractions(self, node: Node) -> bool:
        """Whether a fraction of literals meets a fraction: a sum, a product or a mistake."""
        return (
            node.kind == "quotient"
            and self.is_next("frac")
            and all(part.kind == "number" for part in node.parts)
        )

    def mixed(self, whole: Node) -> Node | None:
        """A mixed number, where a fraction of literals follows a whole one; it must be smaller than
        1."""
        start = self.place
        if whole.kind != "number" or whole.value.denominator != 1 or self.next.gap > 1:
            return None
        if self.next.kind == "number" and self.next.gap:
            over = self.atom()
            under = self.atom() if self.take("/") and self.next.kind == "number" else None
        elif self.is_next("frac"):
            over, under = self.atom().parts
        else:
            return None
        if under is None or over.kind != "number" or under.kind != "number":
            self.place = start
            return None
        if (
            not 0 < over.value < under.value
            or over.value.denominator != 1
            or under.value.denominator != 1
        ):
            raise NotUnderstood("no mixed number")
        return number(whole.value + Fraction(over.value, under.value))

    def postfixed(self) -> Node:
        """An atom with its powers, factorials, degrees, or the base of its digits."""
        node = self.atom()
        while True:
            if self.is_next("^"):
                is_closed = self.last.text == ")"
                self.place += 1
                if node.kind == "power" and not is_closed:
                    raise NotUnderstood("two powers of one")
                node = self.degrees(node) or Node("power", parts=(node, self.script()))
            elif self.take("!"):
                if self.is_next("!"):
                    raise NotUnderstood("a double factorial")
                node = Node("factorial", parts=(node,))
            elif self.take("degree"):
                node = Node("degree", parts=(node,))
            elif self.is_next("_"):
                node = self.based(node)
            else:
                return node

    def degrees(self, node: Node) -> Node | None:
        """The node in degrees, of a scale or of an angle, where that is what the power says."""
        start = self.place
        is_group = self.take("{")
        if not self.take("circ", "degree") or (is_group and not self.take("}")):
            self.place = start
            return None
        scale = self.take("C", "F") or self.take_word("c", "f")
        return Node("degree", scale.text if scale else "", parts=(node,))

    def based(self, node: Node) -> Node:
        """The digits of a number with its base below."""
        digits = self.last
        self.need("_")
        base = self.script()
        is_whole = digits.kind == "number" and digits.text.isdigit() and node.kind == "number"
        if not is_whole or base.kind != "number" or base.value not in range(2, 37):
            raise NotUnderstood("an index to what has no base")
        return Node("base", digits.text.lstrip("0") or "0", value=base.value)


def _is_unit(token: Token) -> bool:
    """Whether an upright word is no variable."""
    return token.kind == "word" and (len(token.text) > 1 or token.text in units.LETTERS)


def _without_degrees(node: Node) -> Node:
    """A value whose degrees stand outside of functions, as a quantity in degrees; any other as it
    is."""
    scales: set[str] = set()
    found = _strip_degrees(node, scales)
    if len(scales) > 1:
        raise NotUnderstood("degrees of several scales")
    return Node("quantity", f"degree {scales.pop()}".strip(), parts=(found,)) if scales else node


def _strip_degrees(node: Node, scales: set[str]) -> Node:
    if node.kind == "degree":
        scales.add(node.name)
        return node.parts[0]
    if node.kind in ("function", "quantity"):
        return node
    return replace(node, parts=tuple(_strip_degrees(part, scales) for part in node.parts))
