"""Completions in a server's answers, as vLLM words them, checked."""

import math
from typing import Any

from potstill.config import Sampling
from potstill.engines.protocol import EngineError
from potstill.types import Completion, NonFiniteError


def choices_in(answer: Any, num: int) -> list[Any]:
    """So many choices of an answer, in their order. Raises EngineError for other answers."""
    try:
        choices = list(answer["choices"])
        if len(choices) != num:
            raise ValueError(f"{len(choices)} choices for {num}")
        return choices
    except (KeyError, TypeError, ValueError) as error:
        raise _no_answer(error) from None


def _no_answer(error: Exception) -> EngineError:
    return EngineError(
        f"the engine's answer is none of vLLM's ({type(error).__name__}: {error}); name a server "
        "of the version that docs/engines.md says"
    )


def read_completion(
    choice: Any,
    cap: int,
    *,
    end_ids: frozenset[int],
    vocab_size: int | None,
    sampling: Sampling,
) -> Completion:
    """The completion in a choice of an answer. Raises EngineError for one that cannot be, and
    NonFiniteError for numbers that are none."""
    try:
        token_ids = tuple(int(token_id) for token_id in choice["token_ids"])
        log_probs = tuple(
            math.nan if value is None else float(value)
            for value in choice["logprobs"]["token_logprobs"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _no_answer(error) from None
    has_ended = bool(token_ids) and token_ids[-1] in end_ids
    has_room = vocab_size is None or max(token_ids, default=0) < vocab_size
    wrong = {
        "as many log-probabilities as tokens": len(log_probs) != len(token_ids),
        f"from 1 to {cap} tokens": not 1 <= len(token_ids) <= cap,
        "no end token before the last": not end_ids.isdisjoint(token_ids[:-1]),
        "an end token, or the cap's length": not has_ended and len(token_ids) != cap,
        f"ids below {vocab_size}": not has_room,
    }
    for wanted, is_wrong in wrong.items():
        if is_wrong:
            raise EngineError(
                f"the engine's completion has {len(token_ids)} tokens and {len(log_probs)} "
                f"log-probabilities and should have {wanted}; its last ids are {token_ids[-4:]}"
            )
    if not all(map(math.isfinite, log_probs)):
        raise NonFiniteError(
            "the log-probabilities that the engine tells are not finite, so its model has no "
            "distribution to draw from"
        )
    is_greedy = sampling.temperature == 0
    return Completion(
        token_ids=token_ids,
        stop="end" if has_ended else "length",
        log_probs=(0.0,) * len(token_ids) if is_greedy else log_probs,
        entropies=(),
        models=(0,) * len(token_ids),
    )
