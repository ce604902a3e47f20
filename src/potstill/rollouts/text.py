"""Measures of a text: where its answer ends, and whether it repeats itself."""

import zlib
from collections.abc import Callable, Sequence

from potstill.types import Rollout

# How much of a text's end is looked at, and how many times smaller zlib makes a loop.
LOOP_CHARACTERS, LOOP_RATIO = 10_000, 10.0


def responses(rollouts: Sequence[Rollout], tokenizer) -> list[str]:
    """The completions as texts, without special tokens."""
    ids = [list(rollout.completion_ids) for rollout in rollouts]
    # From no ids at all transformers makes one empty text.
    return tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []


def zlib_ratio(text: str) -> float:
    """How many times smaller zlib makes the text: about 1 for short prose, above 10 for a loop."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 1.0


def num_tokens_to_answer(
    completion_ids: Sequence[int], text: str, tokenizer, answer_end: Callable[[str], int | None]
) -> int:
    """How many tokens there are up to the end of the first final answer; all of them when there is
    none.

    What follows the answer, a loop above all, would otherwise dominate the entropy and the length.
    The end token is not counted, nor others after it: the text, which has none of them, does not
    show whether they are one or many.
    """
    end = answer_end(text)
    if end is None:
        return len(completion_ids)
    low, high = 1, len(completion_ids)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(completion_ids[:middle], skip_special_tokens=True)) >= end:
            high = middle
        else:
            low = middle + 1
    return low


def is_loop(text: str) -> bool:
    """Whether a text repeats itself: zlib makes its last 10,000 characters ten times smaller (arXiv
    2604.08527)."""
    return zlib_ratio(text[-LOOP_CHARACTERS:]) > LOOP_RATIO
