"""Numbers of a step from rollouts and their texts."""

import dataclasses

from conftest import make_model, make_rollout

from potstill.rollouts.batching import make_batch
from potstill.training.metrics import before_answer


def test_texts_go_with_rollouts_by_their_place():
    """Rollouts that are equal, or were replaced since their texts were made, are no others."""
    tokenizer = make_model().tokenizer
    ids = tokenizer("1+2=3=2", add_special_tokens=False).input_ids
    whole = make_rollout([1], ids)
    cut = make_rollout([1], ids, trained=[True, False] + [True] * (len(ids) - 2))
    rollouts = [whole, dataclasses.replace(whole), cut, make_rollout([1], ids[:2])]
    texts = tokenizer.batch_decode([list(rollout.completion_ids) for rollout in rollouts])
    batch = make_batch([dataclasses.replace(rollout) for rollout in rollouts])
    found_N = before_answer(batch, texts, tokenizer, lambda text: text.find("=") + 1 or None)
    num = texts[0].index("=") + 1
    flags = [True] * num + [False] * (len(ids) - num)
    assert len(texts[0]) == len(ids), "one token a character"
    assert found_N.tolist() == [*flags, *flags, flags[0], *flags[2:], True, True]
