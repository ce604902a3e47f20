r"""Tokens of a final answer in LaTeX, as models write it: normalised, and nothing dropped that
could mean something.

Font and size macros, `\left`, display markers and thin spaces go; fractions in all spellings,
Unicode signs and digit groups become one form each. Words keep apart from letters: `\text{ cm}` is
a word, `x` a letter, `eggs` a word.
"""

# ruff: noqa: RUF001 (signs that look like others are what this file is about)

import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Literal

from potstill.answers.tree import NotUnderstood, words

Mode = Literal["math", "roman", "text"]
TokenKind = Literal["number", "letter", "word", "macro", "sign", "end"]


@dataclass(frozen=True, slots=True)
class Token:
    """A token, and the space before it: 0 none, 1 thin or a blank, 2 wide."""

    kind: TokenKind
    text: str
    gap: int = 0


def spellings(text: str) -> dict[str, str]:
    """A table of lines: a name, then all that is written for it."""
    lines = [line.split() for line in text.splitlines()]
    return {each: name for name, *others in filter(None, lines) for each in others}


# One character each; what a word processor or a model writes for the macro.
SIGN_SPELLINGS = spellings(r"""
    - − – ‐
    ' ′ ’
    \pi π
    \infty ∞
    \times ×
    \cdot · ⋅ ∙
    \div ÷
    \pm ±
    \mp ∓
    \le ≤ ⩽
    \ge ≥ ⩾
    \ne ≠
    \approx ≈
    \to →
    \ldots …
    \in ∈
    \cup ∪
    \cap ∩
    \setminus ∖
    \emptyset ∅
    \mathbb{R} ℝ
    \mathbb{Z} ℤ
    \mathbb{N} ℕ
    \mathbb{Q} ℚ
    \mathbb{C} ℂ
    \lor ∨
    \land ∧
    ^\circ °
    \text{cents} ¢
    \euro €
    \pounds £
    \yen ¥
    \rupee ₹
    \langle ⟨
    \rangle ⟩
    \lfloor ⌊
    \rfloor ⌋
    \lceil ⌈
    \rceil ⌉
""")
RENAMED = spellings(r"""
    frac dfrac tfrac cfrac
    binom dbinom tbinom
    le leq leqslant leqq
    ge geq geqslant geqq
    ne neq
    < lt
    > gt
    emptyset varnothing
    cdot ast times bullet
    lor vee
    land wedge
    setminus backslash smallsetminus
    | lvert rvert vert
    \{ lbrace
    \} rbrace
    [ lbrack
    ] rbrack
    : colon
    i imath
""")
GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi chi psi omega varepsilon vartheta varphi varrho varsigma Gamma Delta Theta "
    "Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell"
)
FUNCTIONS = words(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp gcd lcm max min"
)
# Macros that say how something looks, with nothing of their own.
LOOKS = words(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle "
    "textstyle limits nolimits rm bf it boldmath normalfont large Large"
)
# Macros that say how their argument looks.
FONTS = words("mathbf mathit mathsf mathtt mathcal boldsymbol bm boxed fbox ensuremath underline")
ROMANS = words("mathrm operatorname")
TEXT_MACROS = words("text textbf textit textrm textnormal textsf texttt emph mbox hbox textup")
WIDE = words("quad qquad hspace enspace")
THIN = words("thinspace medspace thickspace space nobreakspace")
# Words of two or three letters; longer runs of letters are words anyway.
SHORT_WORDS = words(
    "yes no odd none and or to of is not all any the per in on up day men ft cm mm km kg mg ml "
    "oz lb hr sq cu mph am pm"
)
# Macros that may lack their backslash.
BARE_MACROS = {name: name for name in ("infty", "pi", "sqrt", *FUNCTIONS, *GREEK)}
BARE_MACROS |= dict.fromkeys(("inf", "infinity", "oo"), "infty")

_THIN_SPACE = r"(?:\\[,;: ]|~|\s|\\thinspace(?![a-zA-Z]))"
_TOKEN = re.compile(
    r"(?P<space>(?:\s|~|\\[,;:!\s])+)"
    rf"|(?P<groups>\d{{1,3}}(?:(?P<by>{_THIN_SPACE}|\{{,\}})\d{{3}})(?:(?P=by)\d{{3}})*(?!\d)(?:\.\d+)?(?!\s*/|\.\d))"
    r"|(?P<number>(?:\d+(?:\.(?:\d+|(?=\\overline)))?|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)"
    r"|\\(?P<macro>[a-zA-Z]+\*?|\\|[{}%$&#_|])|(?P<letters>[a-zA-Z]+)|(?P<sign>.)",
    re.DOTALL,
)
_COMMA_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789")


def normalise(text: str) -> str:
    """The answer in ASCII, without dollars around mathematics and the full stop that ends a
    sentence."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda run: f"^{{{run[0].translate(_SMALL)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda run: f"_{{{run[0].translate(_SMALL)}}}", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    text = "".join(f"{SIGN_SPELLINGS[c]} " if c in SIGN_SPELLINGS else _plain(c) for c in text)
    text = (
        re.sub(r"\\!\s*", "", text).replace("\\textdollar", r"\$").replace(r"\textpercent", r"\%")
    )
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = re.sub(r"\b([ap])\.\s?m\.", r"\1m", text)
    text = re.sub(r"^\s*\*\*([^*]+)\*\*\s*$", r"\1", text)
    return re.sub(r"(?<!\.)\.$", "", text.strip()).strip()


def _plain(character: str) -> str:
    """A vulgar fraction, a Greek letter, a no-break space or a wide digit in ASCII; else the
    character."""
    if character.isascii():
        return character
    name = unicodedata.name(character, "").split()
    if name[:1] == ["GREEK"] and name[-1].lower() in GREEK:
        return f"\\{name[-1].lower() if name[1] == 'SMALL' else name[-1].capitalize()} "
    plain = unicodedata.normalize("NFKC", character)
    if name[:2] == ["VULGAR", "FRACTION"]:
        over, _, under = plain.partition("⁄")
        return f"\\frac{{{over}}}{{{under}}}"
    return plain


def with_digit_groups(text: str) -> str:
    """The text where commas outside of brackets that part well-formed groups of digits are gone."""
    depth, pieces, last = 0, [], 0
    depths = []
    for character in text:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        depths.append(depth)
    for match in _COMMA_GROUPS.finditer(text):
        if depths[match.start()] == 0:
            pieces += [text[last : match.start()], match[0].replace(",", "")]
            last = match.end()
    return "".join(pieces) + text[last:]


def tokens(text: str) -> list[Token]:
    """The tokens of a normalised answer and an end. Raises NotUnderstood for a macro without its
    argument."""
    return [*_tokens(text, "math"), Token("end", "", 2)]


def _tokens(text: str, mode: Mode) -> list[Token]:
    found: list[Token] = []
    gap, place = 0, 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        assert match is not None
        place, piece = match.end(), match[0]
        new: list[Token] = []
        if match["space"]:
            gap = max(gap, 1)
        elif match["groups"]:
            new = [Token("number", re.sub(r"[^\d.]", "", piece))]
        elif match["number"]:
            new = [Token("number", piece)]
        elif match["letters"]:
            new = _letters(piece, mode, bool(found) and found[-1].kind == "number" and gap > 0)
        elif match["macro"]:
            new, gap, place = _macro(
                RENAMED.get(match["macro"], match["macro"]), text, place, gap, mode
            )
        else:
            new = [Token("sign", piece)]
        if new:
            found += [replace(new[0], gap=max(gap, new[0].gap)), *new[1:]]
            gap = 0
    return found


def _macro(name: str, text: str, place: int, gap: int, mode: Mode) -> tuple[list[Token], int, int]:
    """A macro's tokens, the gap before them (or after what has none), and where it ends."""
    if name in LOOKS:
        # \left. and \right. draw nothing.
        dot = re.match(r"\s*\.", text[place:]) if name in ("left", "right") else None
        return [], gap, place + (dot.end() if dot else 0)
    if name in WIDE | THIN:
        return (
            [],
            2 if name in WIDE else max(gap, 1),
            argument(text, place)[1] if name == "hspace" else place,
        )
    if name in FONTS | ROMANS | TEXT_MACROS:
        inner, place = argument(text, place)
        inside = _tokens(
            inner, "text" if name in TEXT_MACROS else "roman" if name in ROMANS else mode
        )
        return inside, gap if inside else max(gap, 1), place
    if name == "i":
        return [Token("letter", "i")], gap, place
    if name == "\\":
        # A row's end may say how much space follows.
        space = re.match(r"\s*\[[^\]]*(?:pt|em|ex|mm|cm)\]", text[place:])
        return [Token("macro", name)], gap, place + (space.end() if space else 0)
    if name in "{}&#_|" and text[place - 1] == name:
        # A character that is drawn, and not what the character alone stands for.
        name = f"\\{name}"
    return [Token("sign" if name in "<>|[]:" else "macro", name)], gap, place


def _letters(run: str, mode: Mode, after_number: bool) -> list[Token]:
    """A run of letters as a macro that lacks its backslash, a word, or letters that are
    multiplied."""
    upright = mode != "math"
    if run in BARE_MACROS and mode != "text" and not (upright and after_number):
        return [Token("macro", BARE_MACROS[run])]
    if upright or len(run) > 3 or run.lower() in SHORT_WORDS or (after_number and len(run) > 2):
        return [Token("word", run)]
    return [Token("letter", letter) for letter in run]


def argument(text: str, place: int) -> tuple[str, int]:
    """The argument of a macro that ends at `place`, a group or one character, and where it ends."""
    while place < len(text) and text[place].isspace():
        place += 1
    if place == len(text):
        raise NotUnderstood("a macro without its argument")
    if text[place] != "{":
        return text[place], place + 1
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[place:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[place + 1 : place + match.start()], place + match.end()
    raise NotUnderstood("an open brace")
