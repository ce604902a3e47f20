"""The smallest parts of an answer: numbers, names, functions, brackets, matrices."""

from fractions import Fraction

from potstill.answers.tokens import FUNCTIONS, GREEK, Token
from potstill.answers.tree import EXPRESSIONS, INFINITY, Node, NotUnderstood, negative, number

# The depth to which brackets, groups and arguments may be nested.
MAX_DEPTH = 40
SYMBOLS = {"pi", "infty", "angle", "triangle", *GREEK}
NUMBER_SETS = {"R": "reals", "Z": "integers", "N": "naturals", "Q": "rationals", "C": "complexes"}
MATRICES = ("pmatrix", "bmatrix", "matrix", "smallmatrix", "array")
OF_SEVERAL = ("gcd", "lcm", "max", "min")


class Atoms:
    """A recursive descent over tokens, up to one factor of a product; `Reader` has what is made of
    factors."""

    def __init__(self, tokens: list[Token]):
        self.tokens, self.place, self.depth, self.num_bars = tokens, 0, 0, 0

    def sum(self) -> Node:
        """Terms with their signs."""
        raise NotImplementedError

    def element(self) -> Node:
        """An item of a tuple, set or matrix."""
        raise NotImplementedError

    def item(self) -> Node:
        """A value or a relation."""
        raise NotImplementedError

    def argument(self) -> Node:
        """A function's argument without brackets."""
        raise NotImplementedError

    @property
    def next(self) -> Token:
        """The token to be read; the last one is the end."""
        return self.tokens[self.place]

    def ahead(self, num: int) -> Token:
        """The token that stands so many behind the next one, or the end."""
        return self.tokens[min(self.place + num, len(self.tokens) - 1)]

    @property
    def last(self) -> Token:
        """The token that was read last."""
        return self.tokens[self.place - 1]

    def is_next(self, *texts: str) -> bool:
        """Whether the next token is one of these, and no word."""
        return self.next.kind not in ("end", "word") and self.next.text in texts

    def take(self, *texts: str) -> Token | None:
        """The next token where it is one of these, and no word; the place is then behind it."""
        if not self.is_next(*texts):
            return None
        self.place += 1
        return self.last

    def is_word(self, *texts: str) -> bool:
        """Whether the next token is one of these words."""
        return self.next.kind == "word" and self.next.text.lower() in texts

    def take_word(self, *texts: str) -> Token | None:
        """The next token where it is one of these words; the place is then behind it."""
        if not self.is_word(*texts):
            return None
        self.place += 1
        return self.last

    def need(self, text: str) -> None:
        """Go past a token that must stand here. Raises NotUnderstood."""
        if not self.take(text):
            raise NotUnderstood(f"{self.next.text!r} where {text!r} should stand")

    def deeper(self) -> None:
        """Count a bracket, group or argument that begins. Raises NotUnderstood beyond MAX_DEPTH."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotUnderstood("too deep")

    def atom(self, is_script: bool = False) -> Node:
        """A number, name, function, bracket or group. An index or power of one token has no index
        of its own."""
        token = self.next
        if token.kind == "number":
            self.place += 1
            return self.decimal(token)
        if token.kind == "letter" or (token.kind == "word" and len(token.text) == 1):
            self.place += 1
            return self.named(token.text, is_script)
        if token.kind == "macro":
            return self.macro(is_script)
        if token.text in ("(", "["):
            return self.bracketed()
        if token.text == "{":
            return self.group()
        if token.text == "|":
            self.num_bars += 1
            node = self.between("|", "|", "abs")
            self.num_bars -= 1
            return node
        raise NotUnderstood(f"{token.text!r} where a value should stand")

    def decimal(self, token: Token) -> Node:
        """A number, with the digits that repeat."""
        if "." not in token.text or self.next.gap or not self.take("overline"):
            return number(token.text.lower())
        self.need("{")
        repeated = self.next.text
        if not repeated.isdigit():
            raise NotUnderstood("what repeats")
        self.place += 1
        self.need("}")
        num_before = len(token.text.partition(".")[2])
        rest = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**num_before)
        return number(Fraction(token.text + "0") + rest)

    def named(self, name: str, is_script: bool = False) -> Node:
        """A constant, or a variable with its primes and index."""
        if not is_script:
            while self.take("'"):
                name += "'"
            if self.take("_"):
                start = self.place
                self.script()
                index = [token.text for token in self.tokens[start : self.place]]
                name += "_" + " ".join(text for text in index if text not in "{}")
        return Node("constant", name) if name in ("e", "i") else Node("variable", name)

    def macro(self, is_script: bool) -> Node:
        """Read a macro and what belongs to it. Raises NotUnderstood for a macro that is not
        known."""
        name = self.next.text
        if name in ("lfloor", "lceil"):
            return self.between(name, name.replace("l", "r", 1), name[1:])
        if name == "langle":
            return self.collection(name, "rangle", "tuple")
        if name == r"\{":
            return self.collection(r"\{", r"\}", "set")
        self.place += 1
        if name in ("frac", "binom"):
            return Node("quotient" if name == "frac" else "binomial", parts=self.two_arguments())
        if name == "sqrt":
            return self.radical()
        if name in ("pi", "infty"):
            return Node("constant", name)
        if name in SYMBOLS:
            return self.named(f"\\{name}", is_script)
        if name in FUNCTIONS:
            return self.function(name)
        if name == "emptyset":
            return Node("set")
        if name == "mathbb":
            letter = self.braced().name
            if letter in NUMBER_SETS:
                return Node("numbers", NUMBER_SETS[letter])
        if name == "begin":
            return self.matrix()
        raise NotUnderstood(f"\\{name}")

    def group(self) -> Node:
        """A sum in braces."""
        self.need("{")
        self.deeper()
        node = self.sum()
        self.depth -= 1
        self.need("}")
        return node

    def script(self) -> Node:
        """Read a superscript or subscript: a group, or one atom with its sign."""
        if self.is_next("{"):
            return self.group()
        minus = self.take("-")
        if self.is_next("(") and not minus:
            return self.bracketed()
        if not (
            self.next.kind in ("number", "letter", "word") or self.is_next("frac", "sqrt", *SYMBOLS)
        ):
            raise NotUnderstood(f"{self.next.text!r} as a power or an index")
        node = self.atom(is_script=True)
        return negative(node) if minus else node

    def braced(self) -> Node:
        """An argument: a group, or one digit, letter or symbol."""
        if self.is_next("{"):
            return self.group()
        is_digit = self.next.kind == "number" and len(self.next.text) == 1
        if not (is_digit or self.next.kind == "letter" or self.is_next(*SYMBOLS)):
            raise NotUnderstood(f"{self.next.text!r} as an argument")
        return self.atom(is_script=True)

    def two_arguments(self) -> tuple[Node, Node]:
        r"""The arguments of a fraction: `\frac12` has two digits, and no further digit may touch
        one without braces."""
        digits = self.next.text
        if self.next.kind == "number" and digits.isdigit() and len(digits) == 2:
            self.place += 1
            return number(digits[0]), number(digits[1])
        first = self.braced()
        is_bare = not self.is_next("{")
        second = self.braced()
        if is_bare and self.next.kind == "number" and not self.next.gap:
            raise NotUnderstood("digits after a fraction")
        return first, second

    def radical(self) -> Node:
        r"""A root; `\sqrt13` and `\sqrt(13)` are meant for that of 13."""
        order = number(2)
        if self.take("["):
            self.deeper()
            order = self.sum()
            self.depth -= 1
            self.need("]")
        if self.next.kind == "number":
            self.place += 1
            return Node("root", parts=(number(self.last.text), order))
        inner = self.bracketed() if self.is_next("(") else self.braced()
        return Node("root", parts=(self.of_one(inner), order))

    def of_one(self, node: Node) -> Node:
        """The node where it has a value. Raises NotUnderstood for a tuple, an interval, a set."""
        if node.kind not in EXPRESSIONS:
            raise NotUnderstood("a function of several")
        return node

    def function(self, name: str) -> Node:
        """A function's name was read: its base and power, and its argument in brackets or
        without."""
        power, base = None, number(10)
        if name == "log" and self.take("_"):
            if self.next.kind == "number" and len(self.next.text) > 1:
                raise NotUnderstood("digits below a logarithm")
            base = self.script()
        if self.take("^"):
            power = self.script()
        inner = self.bracketed() if self.is_next("(") else self.argument()
        if name in OF_SEVERAL:
            if inner.kind != "tuple":
                raise NotUnderstood(f"{name} of one")
            parts = tuple(self.of_one(part) for part in inner.parts)
        else:
            parts = (self.of_one(inner),)
        if power == number(-1) and name in ("sin", "cos", "tan"):
            name, power = f"arc{name}", None
        if name in ("log", "lg"):
            name, parts = "log", (*parts, base)
        node = Node("function", name, parts=parts)
        return node if power is None else Node("power", parts=(node, power))

    def between(self, opener: str, closer: str, name: str) -> Node:
        """A function that is written by the signs around its argument."""
        self.need(opener)
        self.deeper()
        node = self.sum()
        self.depth -= 1
        self.need(closer)
        return Node("function", name, parts=(node,))

    def bracketed(self) -> Node:
        """One value in brackets, a tuple, or an interval."""
        opener = self.next.text
        self.place += 1
        items = self.elements()
        closer = self.take(")", "]")
        if closer is None:
            raise NotUnderstood("an open bracket")
        ends = opener + closer.text
        if len(items) == 1 and ends in ("()", "[]"):
            return items[0]
        if len(items) == 2 and (ends != "()" or any(_is_infinite(item) for item in items)):
            return Node("interval", ends, parts=items)
        if ends in ("()", "[]"):
            return Node("tuple", "" if ends == "()" else ends, parts=items)
        raise NotUnderstood(f"several in the brackets {ends}")

    def elements(self) -> tuple[Node, ...]:
        """Items between commas or semicolons."""
        self.deeper()
        items = [self.element()]
        while self.take(",", ";"):
            items.append(self.element())
        self.depth -= 1
        return tuple(items)

    def collection(self, opener: str, closer: str, kind: str) -> Node:
        """A set by its elements or its condition, or a tuple in angle brackets."""
        self.need(opener)
        if self.take(closer):
            return Node(kind)
        if kind == "set" and self.next.kind == "letter" and self.ahead(1).text in (":", "|", "mid"):
            name = self.next.text
            self.place += 2
            condition = self.item()
            self.need(closer)
            return Node("where", name, parts=(condition,))
        items = self.elements()
        self.need(closer)
        return Node(kind, parts=items)

    def matrix(self) -> Node:
        """A matrix's rows, all of one length."""
        name = self.environment()
        if name not in MATRICES:
            raise NotUnderstood(f"the environment {name}")
        if name == "array" and self.take("{"):
            while not self.take("}"):
                if not self.next.text or not set(self.next.text) <= set("lcr|"):
                    raise NotUnderstood("an array's columns")
                self.place += 1
        rows = [self.row()]
        while self.take("\\"):
            if not self.is_next("end"):
                rows.append(self.row())
        self.need("end")
        if self.environment() != name or len({len(row.parts) for row in rows}) != 1:
            raise NotUnderstood("a matrix without its end, or with rows of several lengths")
        return Node("matrix", parts=tuple(rows))

    def row(self) -> Node:
        """A row of a matrix."""
        items = [self.element()]
        while self.take("&"):
            items.append(self.element())
        return Node("row", parts=tuple(items))

    def environment(self) -> str:
        """An environment's name in braces."""
        self.need("{")
        name = ""
        while self.next.kind in ("letter", "word"):
            name += self.next.text
            self.place += 1
        self.need("}")
        return name


def _is_infinite(node: Node) -> bool:
    return node == INFINITY or any(_is_infinite(part) for part in node.parts)
