"""The prompts of a run at a glance: how many of which source, how long, and the first one in full.

Lines fit 100 columns.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

from potstill.console.printable import WIDTH, one_line
from potstill.types import Example, Prompt

# Columns of the longest source's name, and the most rows of the table for sources.
SOURCE_WIDTH, MOST_SOURCES = 28, 8
HEADER = ("number", "dropped", "cut", "min", "median", "95 %", "max")
# Characters that show whether the template is right: from a text's beginning, and from its end.
SHOWN_HEAD, SHOWN_TAIL = 300, 100
# Around the loss tokens of a completion.
OPEN, CLOSE = "⟦", "⟧"


def length_table(
    names: Sequence[str], examples: Sequence[Example], prompts: Sequence[Prompt], window: int
) -> list[str]:
    """A table of the prompts of each source, and of what the teacher reads and the data's
    completions where there are some; lengths are in tokens.

    Of `examples` those that have no prompt were too long and dropped; a prompt is cut that lost its
    first tokens, and a completion that is longer than the window.
    """
    places = list(range(len(names)))
    num_examples = Counter(_place(example, names) for example in examples)
    of = {place: [p for p in prompts if _place(p.example, names) == place] for place in places}
    rows = []
    for place in places[:MOST_SOURCES]:
        num_dropped = num_examples[place] - len(of[place])
        rows.append(_prompt_row(names[place], of[place], num_dropped))
    num_dropped = len(examples) - len(prompts)
    if len(names) > MOST_SOURCES:
        others = [p for place in places[MOST_SOURCES:] for p in of[place]]
        num_others = sum(num_examples[place] for place in places[MOST_SOURCES:])
        name = f"{len(names) - MOST_SOURCES} other sources"
        rows.append(_prompt_row(name, others, num_others - len(others)))
    if len(names) > 1:
        rows.append(_prompt_row("all", prompts, num_dropped))
    if any(p.teacher_ids is not None for p in prompts):
        lengths = [len(p.ids_of("teacher")) for p in prompts]
        rows.append(_row("as the teacher reads them", lengths, "", ""))
    completions = [len(p.completion_ids) for p in prompts if p.completion_ids is not None]
    if completions:
        num_cut = sum(length > window for length in completions)
        rows.append(_row("their completions", completions, "", f"{num_cut:,}"))
    return ["prompts, with lengths in tokens:", *_aligned([("", *HEADER), *rows])]


def first_prompt(
    prompts: Sequence[Prompt], tokenizer, teacher_tokenizer=None, window: int | None = None
) -> list[str]:
    """The first prompt as the student reads it, its completion with the loss tokens marked where
    the data has one, and what the teacher reads where that is another."""
    prompt = prompts[0]
    lines = _shown(f"first of {len(prompts)} prompts:", tokenizer.decode(prompt.token_ids))
    if prompt.completion_ids is not None and prompt.trained is not None:
        text = marked(prompt.completion_ids[:window], prompt.trained[:window], tokenizer)
        is_cut = window is not None and len(prompt.completion_ids) > window
        cut = f" (its first {window:,} tokens)" if is_cut else ""
        lines += _shown(f"its completion{cut}, loss tokens between {OPEN} and {CLOSE}:", text)
    if teacher_tokenizer is not None and prompt.teacher_ids is not None:
        lines += _shown("the teacher reads:", teacher_tokenizer.decode(prompt.teacher_ids))
    return lines


def marked(
    token_ids: Sequence[int],
    trained: Sequence[bool],
    tokenizer,
    marks: tuple[str, str] = (OPEN, CLOSE),
) -> str:
    """The text of a completion, with marks around the tokens that are trained on."""
    text, (first, last) = "", marks
    for is_trained, group in itertools.groupby(
        zip(token_ids, trained, strict=True), key=lambda pair: pair[1]
    ):
        part = tokenizer.decode([token_id for token_id, _ in group])
        text += f"{first}{part}{last}" if is_trained else part
    return text


def quantile(lengths: Sequence[int], share: float) -> int:
    """The smallest length that at least this share of all does not exceed."""
    return sorted(lengths)[max(math.ceil(share * len(lengths)) - 1, 0)]


def _place(example: Example, names: Sequence[str]) -> int:
    return example.source if len(names) > 1 else 0


def _prompt_row(name: str, prompts: Sequence[Prompt], num_dropped: int) -> tuple[str, ...]:
    num_cut = sum(prompt.num_cut > 0 for prompt in prompts)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    return _row(name, lengths, f"{num_dropped:,}", f"{num_cut:,}")


def _row(name: str, lengths: Sequence[int], dropped: str, cut: str) -> tuple[str, ...]:
    name = one_line(name)
    if len(name) > SOURCE_WIDTH:
        name = "..." + name[3 - SOURCE_WIDTH :]
    if not lengths:
        return (name, "0", dropped, cut, "", "", "", "")
    numbers = (min(lengths), quantile(lengths, 0.5), quantile(lengths, 0.95), max(lengths))
    return (name, f"{len(lengths):,}", dropped, cut, *(f"{number:,}" for number in numbers))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = [cell.rjust(max(width, 6)) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"  {name.ljust(widths[0])}", *numbers]).rstrip())
    return lines


def _shown(title: str, text: str) -> list[str]:
    """A text with its spaces and line breaks to be seen, on the title's line or below it."""
    if len(text) > SHOWN_HEAD + SHOWN_TAIL:
        num = len(text) - SHOWN_HEAD - SHOWN_TAIL
        text = f"{text[:SHOWN_HEAD]} [... {num:,} characters ...] {text[-SHOWN_TAIL:]}"
    shown = one_line(repr(text))
    if len(title) + 1 + len(shown) <= WIDTH:
        return [f"{title} {shown}"]
    pieces = [shown[i : i + WIDTH - 2] for i in range(0, len(shown), WIDTH - 2)]
    return [title, *(f"  {piece}" for piece in pieces)]
