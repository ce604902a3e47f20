"""Values of expressions: exact where they are rational, else to as many digits as their largest
part needs.

A power or factorial beyond MAX_BITS is refused, not computed, and so is what needs more than
MAX_DIGITS; an expression of many parts can still take seconds.
"""

import math
import random
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath

from potstill.answers.tree import Node, difference

# The largest exact number, in bits; 2006! has 19,000.
MAX_BITS = 200_000
# Digits beyond those that the sizes of the parts take.
GUARD_DIGITS = 60
MAX_DIGITS = 4_000
# The least number of points at which both expressions must have a value.
MIN_POINTS = 3

# A Fraction, or mpmath's complex number.
Value = Any


class Undefined(ValueError):
    """An expression without a value, or one too large to compute."""


def variables(node: Node) -> set[str]:
    """The names of the variables of an expression."""
    own = {node.name} if node.kind == "variable" else set()
    return own.union(*(variables(part) for part in node.parts))


def points(names: set[str]) -> list[dict[str, Fraction]]:
    """Where expressions in these variables are compared: the same places every time, once without
    variables."""
    if not names:
        return [{}]
    chance = random.Random(0)
    kinds = [(signs, size) for signs in ((1,), (-1,), (1, -1)) for size in (20, 100, 1000)]
    return [
        {
            name: chance.choice(signs) * Fraction(chance.randint(2, size), chance.randint(2, 9))
            for name in sorted(names)
        }
        for signs, size in kinds
    ]


def is_equal(a: Node, b: Node) -> bool:
    """Whether two expressions have one value wherever both have one, and that at enough points.

    With variables and without `i`, what is not real has no value: the root of x times that of y is
    the root of xy.
    """
    names = variables(a) | variables(b)
    is_real = bool(names) and not (_is_complex(a) or _is_complex(b))
    apart = difference(a, b)
    num_compared = 0
    for point in points(names):
        try:
            if not is_zero(apart, point, is_real):
                return False
        except Undefined:
            continue
        num_compared += 1
    return num_compared >= (MIN_POINTS if names else 1)


def _is_complex(node: Node) -> bool:
    return (node.kind == "constant" and node.name == "i") or any(
        _is_complex(part) for part in node.parts
    )


def is_zero(node: Node, point: Mapping[str, Fraction], is_real: bool = False) -> bool:
    """Whether an expression is 0 at a point: exactly, or beside its largest and smallest part.
    Raises Undefined."""
    with mpmath.workdps(20):
        first = Evaluator(point, is_real)
        value = first.of(node)
    if isinstance(value, Fraction):
        return value == 0
    num_digits = GUARD_DIGITS + 2 * int(first.size * math.log10(2))
    if num_digits > MAX_DIGITS:
        raise Undefined("too large to compare")
    with mpmath.workdps(num_digits):
        value = Evaluator(point, is_real).of(node)
        return abs(_mp(value)) < mpmath.mpf(10) ** -(num_digits - GUARD_DIGITS // 3)


def is_positive(value: Value) -> bool:
    """Whether a value is real, but for rounding, and above 0."""
    if isinstance(value, Fraction):
        return value > 0
    return value.real > 0 and abs(value.imag) < 1e-15 * abs(value.real)


def value_or_none(node: Node, point: Mapping[str, Fraction], is_real: bool = False) -> Value | None:
    try:
        with mpmath.workdps(20):
            return Evaluator(point, is_real).of(node)
    except Undefined:
        return None


def _mp(value: Value) -> Value:
    if isinstance(value, Fraction):
        return mpmath.mpc(mpmath.mpf(value.numerator) / value.denominator)
    return mpmath.mpc(value)


class Evaluator:
    """The value of an expression at one point, with the size of its largest or smallest part as a
    power of 2."""

    def __init__(self, point: Mapping[str, Fraction], is_real: bool = False):
        self.point, self.is_real, self.size = point, is_real, 0.0

    def of(self, node: Node) -> Value:
        """The value. Raises Undefined."""
        try:
            value = self._of(node)
        except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
            raise Undefined(str(error)) from None
        if isinstance(value, Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            if bits > 2 * MAX_BITS:
                raise Undefined("too large")
            self.size = max(self.size, bits)
            return value
        if not mpmath.isfinite(value):
            raise Undefined("infinite")
        if self.is_real and value.imag:
            raise Undefined("not real")
        if value:
            self.size = max(self.size, abs(float(mpmath.log(abs(value), 2))))
        return value

    def _of(self, node: Node) -> Value:
        kind, name = node.kind, node.name
        if kind == "number":
            return node.value
        if kind == "variable":
            return self.point[name]
        if kind == "constant":
            if name == "infty":
                raise Undefined("infinity")
            return {"pi": mpmath.mpc(mpmath.pi), "e": mpmath.mpc(mpmath.e), "i": mpmath.mpc(0, 1)}[
                name
            ]
        if kind == "function":
            return self.function(name, [self.of(part) for part in node.parts])
        if kind not in (
            "sum",
            "product",
            "quotient",
            "power",
            "root",
            "factorial",
            "binomial",
            "degree",
        ):
            raise Undefined(f"a {kind} has no value")
        parts = [self.of(part) for part in node.parts]
        return getattr(self, kind)(*parts)

    def sum(self, *parts: Value) -> Value:
        if all(isinstance(part, Fraction) for part in parts):
            return sum(parts, Fraction(0))  # pyright: ignore
        return sum(map(_mp, parts), mpmath.mpc(0))

    def product(self, a: Value, b: Value) -> Value:
        return a * b if isinstance(a, Fraction) and isinstance(b, Fraction) else _mp(a) * _mp(b)

    def quotient(self, a: Value, b: Value) -> Value:
        return a / b if isinstance(a, Fraction) and isinstance(b, Fraction) else _mp(a) / _mp(b)

    def degree(self, a: Value) -> Value:
        return _mp(a) * mpmath.pi / 180

    def power(self, base: Value, exponent: Value) -> Value:
        if isinstance(exponent, Fraction):
            if exponent.denominator != 1:
                return self.power(
                    self.root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator)
                )
            if abs(exponent) * _bits(base) > MAX_BITS:
                raise Undefined("too large")
            if isinstance(base, Fraction):
                return base ** int(exponent)
            return base ** int(exponent)
        if abs(exponent) * _bits(base) > MAX_BITS:
            raise Undefined("too large")
        return mpmath.power(_mp(base), exponent)

    def root(self, base: Value, order: Value) -> Value:
        """The real root where there is one, exact where it is rational; else the principal one."""
        if not isinstance(order, Fraction) or order.denominator != 1 or not 1 <= order <= 1000:
            return mpmath.power(_mp(base), 1 / _mp(order))
        n = int(order)
        is_negative = isinstance(base, Fraction) and base < 0
        if not isinstance(base, Fraction) or (is_negative and n % 2 == 0):
            is_real = not isinstance(base, Fraction) and base.imag == 0
            if is_real and n % 2 and base.real < 0:
                return -mpmath.root(-base, n)
            return mpmath.root(_mp(base), n)
        exact = [_exact_root(part, n) for part in (abs(base.numerator), base.denominator)]
        sign = -1 if is_negative else 1
        if None not in exact:
            return sign * Fraction(*exact)  # pyright: ignore
        return sign * mpmath.root(_mp(abs(base)), n)

    def factorial(self, a: Value) -> Value:
        if not isinstance(a, Fraction) or a.denominator != 1 or not 0 <= a <= 5000:
            raise Undefined("a factorial of no whole number, or of a large one")
        return Fraction(math.factorial(int(a)))

    def binomial(self, n: Value, k: Value) -> Value:
        """A polynomial in n where k is whole."""
        if not isinstance(n, Fraction) or not isinstance(k, Fraction):
            raise Undefined("a binomial of irrational numbers")
        if n.denominator == k.denominator == 1 and 0 <= n <= 5000 and k >= 0:
            return Fraction(math.comb(int(n), int(k)))
        if k.denominator != 1 or not 0 <= k <= 50:
            raise Undefined("a binomial of no whole number, or of a large one")
        return Fraction(math.prod(n - i for i in range(int(k))), math.factorial(int(k)))

    def function(self, name: str, parts: list[Value]) -> Value:
        if name in ("gcd", "lcm", "max", "min"):
            if not all(isinstance(x, Fraction) for x in parts):
                raise Undefined(name)
            if name in ("max", "min"):
                return {"max": max, "min": min}[name](parts)
            return Fraction({"gcd": math.gcd, "lcm": math.lcm}[name](*(_whole(x) for x in parts)))
        x = parts[0]
        if name == "abs":
            return abs(x) if isinstance(x, Fraction) else mpmath.mpc(abs(x))
        if name in ("floor", "ceil"):
            if not isinstance(x, Fraction):
                x = Fraction(int(mpmath.floor(x.real)))
                return x + 1 if name == "ceil" else x
            return Fraction(math.floor(x) if name == "floor" else math.ceil(x))
        x = _mp(x)
        if name in ("ln", "log"):
            log = mpmath.log(x)
            return log if name == "ln" else log / mpmath.log(_mp(parts[1]))
        if (
            name in ("exp", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc")
            and abs(x) > MAX_BITS
        ):
            raise Undefined("too large")
        names = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
        return mpmath.mpc(getattr(mpmath, names.get(name, name))(x))


def _bits(value: Value) -> float:
    """About the bits that a power takes for each unit of its exponent."""
    if isinstance(value, Fraction):
        return max(value.numerator.bit_length(), value.denominator.bit_length(), 1)
    return abs(float(mpmath.log(abs(value), 2))) + 1 if value else 1


def _exact_root(value: int, n: int) -> int | None:
    if n == 2:
        root = math.isqrt(value)
    elif value.bit_length() < 900:
        root = round(value ** (1 / n))
    else:
        return None
    return next((r for r in (root - 1, root, root + 1) if r >= 0 and r**n == value), None)


def _whole(value: Value) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1:
        raise Undefined("no whole number")
    return int(value)
