"""Units and the words that may follow a number, in one name each."""

import re

from potstill.answers.tree import NotUnderstood, words

# Upright letters that are units after a number; any other letter is a variable.
LETTERS = set("mgshLlNJWVAKCFd")
_SPELLINGS = {
    "dollar": "dollars usd $ bucks",
    "euro": "euros eur",
    "pound": "pounds lb lbs",
    "cent": "cents",
    "degree": "degrees deg",
    "percent": "% percentage pct",
    "m": "meter meters metre metres",
    "cm": "centimeter centimeters centimetre centimetres",
    "mm": "millimeter millimeters millimetre millimetres",
    "km": "kilometer kilometers kilometre kilometres",
    "inch": "in inches",
    "foot": "ft feet",
    "yard": "yd yards",
    "mile": "mi miles",
    "second": "s sec secs seconds",
    "minute": "min mins minutes",
    "hour": "h hr hrs hours",
    "gram": "g grams",
    "kg": "kilogram kilograms",
    "mg": "milligram milligrams",
    "liter": "l liters litre litres",
    "ml": "milliliter milliliters millilitre millilitres",
    "ounce": "oz ounces",
    "mile /hour": "mph",
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people persons",
    "am": "",
    "pm": "",
}
UNIT_NAMES = {
    spelling: name
    for name, spellings in _SPELLINGS.items()
    for spelling in (name, *spellings.split())
}
POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
TIMES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
# Words that deny a value or blur it.
DOUBTS = words(
    "not no never about approximately approx around roughly nearly almost between least most "
    "more less fewer than above below under over maybe possibly perhaps wrong false"
)
# These and others change a value that stands before them, or say that it is not the whole answer.
NONE = DOUBTS | words(
    "or and but if when where for minus plus times divided by negative positive half halves "
    "third thirds quarter quarters fourth fourths fifth fifths tenth tenths hundredths squared "
    "cubed root pi to from zero is are was equals equal mod modulo of out choose base one two "
    "three four five six seven eight nine ten twenty infinity infinite remainder with"
)
# Words between units: `miles per hour`, `cups of feed`, `18 dollars each`.
PER = words("per a an every")
JOINTS = PER | words("of the each")
NONE |= set(TIMES) | PER | words("of the")
MAX_WORDS = 5


def unit(word: str) -> str:
    """The name of the unit that a word is. Raises NotUnderstood for what no unit is."""
    lower = word.lower()
    if lower in NONE or (
        len(word) < 3 and not (lower in UNIT_NAMES or lower in POWERS or word in LETTERS)
    ):
        raise NotUnderstood(f"{word!r} after a value")
    if len(word) == 1:
        return UNIT_NAMES.get(word, word)
    return UNIT_NAMES.get(lower, re.sub(r"(?<=..)s$", "", lower))


def joined(names: list[str]) -> str:
    """One name for `square units`, `sq units` and `units^2`. Raises NotUnderstood for too many
    words."""
    if len(names) > MAX_WORDS:
        raise NotUnderstood("a sentence after a value")
    found, power = [], ""
    for name in names:
        if name in POWERS:
            power = POWERS[name]
        else:
            found.append(name + power)
            power = ""
    if power or not found:
        raise NotUnderstood("the square of no unit")
    return " ".join(found)


def is_same(gold: str, answer: str) -> bool:
    """Whether two units are one; degrees need not name their scale."""
    scales = all(name.split()[0] == "degree" for name in (gold, answer))
    return gold == answer or (scales and "degree" in (gold, answer))
