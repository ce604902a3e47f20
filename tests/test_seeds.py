"""Random streams: no two uses of a run share one, and a seed means the same as ever."""

import itertools
from collections import Counter

import numpy as np
import pytest

from potstill.config import Objective, Sampling
from potstill.rollouts.prefixes import Writing, write_rollouts
from potstill.seeds import Stream, response_key, stream_key
from potstill.types import Example, Prompt

# From 2^32 on a seed is two of numpy's words, and there its keys are one longer.
SEEDS = (0, 1, 2, 5, 2**32 - 1, 2**32 + 1, 2**63 - 1)
# Those of validation are the same for all seeds.
OF_VALIDATION = [stream_key((0, 0, place), Stream.VALIDATION) for place in range(9)]
OF_A_DISTILLATION = (
    Stream.TOKENS,
    Stream.TURNS,
    Stream.SECOND_WRITER,
    Stream.HANDOFF,
    Stream.PROBE,
)


def state_of(key: tuple[int, ...]) -> tuple[int, ...]:
    """All that numpy's generator starts from; other keys can be the same stream, as (1, 2) and (1,
    2, 0) are."""
    return tuple(np.random.SeedSequence(key).generate_state(4, np.uint64).tolist())


def keys_of_a_distillation(seed: int) -> list[tuple[int, ...]]:
    places = itertools.product(range(9), range(9))
    keys = [stream_key((seed, *place), stream) for place in places for stream in OF_A_DISTILLATION]
    return keys + [stream_key((seed, round_, 0), Stream.PLACES) for round_ in range(9)]


def keys_of_grpo(seed: int) -> list[tuple[int, ...]]:
    keys = [
        stream_key((seed, *place), Stream.TOKENS)
        for place in itertools.product(range(7), range(7), range(7))
    ]
    keys += [
        stream_key((seed, step, place, 0), Stream.PROBE) for step in range(7) for place in range(7)
    ]
    return keys + [
        stream_key((seed, 0, place, i), Stream.START) for place in range(7) for i in range(7)
    ]


def test_validation_shares_no_stream_with_steps():
    of_steps = {state_of(key) for seed in SEEDS for key in keys_of_a_distillation(seed)}
    assert not of_steps & {state_of(key) for key in OF_VALIDATION}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("keys_of", [keys_of_a_distillation, keys_of_grpo])
def test_no_two_uses_of_a_run_share_a_stream(keys_of, seed):
    keys = keys_of(seed)
    assert len({state_of(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("keys_of", [keys_of_a_distillation, keys_of_grpo])
def test_seeds_of_one_word_share_no_stream(keys_of):
    keys = [key for seed in SEEDS if seed < 2**32 for key in keys_of(seed)]
    assert len({state_of(key) for key in keys}) == len(keys)


def test_every_stream_is_enumerated():
    others = {Stream.START, Stream.VALIDATION, Stream.PLACES}
    assert {*OF_A_DISTILLATION, *others} == set(Stream)


def test_an_evaluation_shares_streams_with_tokens_alone():
    """With those of a run that has its seed; all else in a run is drawn from other streams."""
    one_word = [seed for seed in SEEDS if seed < 2**32]
    asked = itertools.product(one_word, range(9), range(9))
    responses = {state_of(response_key(*numbers)) for numbers in asked}
    assert len(responses) == 81 * len(one_word)
    for seed in one_word:
        of_seed = {state_of(response_key(seed, i, j)) for i in range(9) for j in range(9)}
        tokens = {
            state_of(stream_key((seed, *place), Stream.TOKENS))
            for place in itertools.product(range(9), range(9))
        }
        assert {state_of(key) for key in keys_of_a_distillation(seed)} & responses == tokens
        assert tokens == of_seed
    assert not responses & {state_of(key) for key in OF_VALIDATION}


def test_a_seed_means_what_it_meant():
    """These keys are behind every run that there is."""
    numbers = {
        "TOKENS": 0,
        "TURNS": 1,
        "SECOND_WRITER": 2,
        "HANDOFF": 3,
        "PROBE": 4,
        "START": 5,
        "VALIDATION": 6,
        "PLACES": 7,
    }
    assert {stream.name: stream.value for stream in Stream} == numbers
    assert stream_key((7, 2, 5), Stream.TOKENS) == (7, 2, 5)
    assert stream_key((7, 2, 5), Stream.HANDOFF) == (7, 2, 5, 3)
    assert response_key(7, 2, 5) == (7, 2, 5)


@pytest.mark.parametrize("prefix_mix", ["sequence", "handoff", "token"])
def test_writers_ask_for_each_stream_once(monkeypatch, student, teacher, prefix_mix):
    """The generators that are made while rollouts are written, not those that a test thinks of."""
    asked, real = Counter(), np.random.default_rng

    def default_rng(key):
        asked[state_of(key)] += 1
        return real(key)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    prompts = [
        Prompt(example=Example(id=str(i), prompt="prompt"), token_ids=(1, 5 + i)) for i in range(8)
    ]
    models = {"student": student.model, "teacher": teacher.model}
    objective = Objective(prefix="mixed", prefix_mix=prefix_mix, handoff_tokens=(2, 5))
    writing = Writing(
        objective=objective,
        models=models,
        window=12,
        end_ids=(2,),
        sampling=Sampling(),
        rollouts_per_step=len(prompts),
    )
    for round_ in range(3):
        write_rollouts(writing, prompts, [(7, round_, place) for place in range(8)])
    # Every place asks for the order of its round's places.
    orders = {state_of(stream_key((7, round_, 0), Stream.PLACES)) for round_ in range(3)}
    shared = {state: num for state, num in asked.items() if num > 1}
    assert shared.keys() == (orders if prefix_mix == "sequence" else set())
    assert len(asked) >= 3 * 8
