"""Random streams: no two uses of a run share one, and a seed means the same as ever."""

import io
import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from potstill.cli.app import main
from potstill.config import Evaluation, Objective, Sampling
from potstill.engines.native import NativeEngine
from potstill.evaluation.responses import write_responses
from potstill.evaluation.scores import prepare_problems
from potstill.rollouts.prefixes import Writing, write_rollouts
from potstill.seeds import Stream, stream_key
from potstill.types import Example, Prompt

# From 2^32 on a seed is two of numpy's words, and there its keys are one longer.
SEEDS = (0, 1, 2, 5, 2**32 - 1, 2**32 + 1, 2**63 - 1)
# Rounds, places, problems, responses and turns. They reach beyond the numbers of all streams.
NUMBERS = range(len(Stream) + 2)
# Uses that draw at every place of a round, and those that draw once a round.
BY_PLACE = (
    Stream.TOKENS,
    Stream.TURNS,
    Stream.SECOND_WRITER,
    Stream.HANDOFF,
    Stream.PROBE,
    Stream.START,
    Stream.EVALUATION,
)
BY_ROUND = (Stream.PLACES, Stream.CHAT, Stream.SAMPLE)
# Uses whose streams are the same for all seeds.
OF_ALL_SEEDS = (Stream.VALIDATION, Stream.MODEL_CHECK)
KEYS_OF_ALL_SEEDS = [
    stream_key((0, 0, place), stream) for place in NUMBERS for stream in OF_ALL_SEEDS
]


def state_of(key: tuple[int, ...]) -> tuple[int, ...]:
    """All that numpy's generator starts from; other keys can be the same stream, as (1, 2) and (1,
    2, 0) are."""
    return tuple(np.random.SeedSequence(key).generate_state(4, np.uint64).tolist())


def keys_of_a_seed(seed: int) -> list[tuple[int, ...]]:
    """The keys of a run, of evaluations, chats and samples that all have this seed."""
    places = itertools.product(NUMBERS, NUMBERS)
    keys = [stream_key((seed, *place), stream) for place in places for stream in BY_PLACE]
    return keys + [
        stream_key((seed, round_, 0), stream) for round_ in NUMBERS for stream in BY_ROUND
    ]


def test_what_all_seeds_share_is_no_stream_of_theirs():
    shared = {state_of(key) for key in KEYS_OF_ALL_SEEDS}
    assert len(shared) == len(KEYS_OF_ALL_SEEDS)
    assert not shared & {state_of(key) for seed in SEEDS for key in keys_of_a_seed(seed)}


@pytest.mark.parametrize("seed", SEEDS)
def test_no_two_uses_of_a_seed_share_a_stream(seed):
    keys = keys_of_a_seed(seed)
    assert len({state_of(key) for key in keys}) == len(keys)


def test_seeds_of_one_word_share_no_stream():
    keys = [key for seed in SEEDS if seed < 2**32 for key in keys_of_a_seed(seed)]
    assert len({state_of(key) for key in keys}) == len(keys)


def test_every_stream_is_enumerated():
    assert {*BY_PLACE, *BY_ROUND, *OF_ALL_SEEDS} == set(Stream)


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
        "EVALUATION": 8,
        "CHAT": 9,
        "SAMPLE": 10,
        "MODEL_CHECK": 11,
    }
    assert {stream.name: stream.value for stream in Stream} == numbers
    assert stream_key((7, 2, 5), Stream.TOKENS) == (7, 2, 5)
    assert stream_key((7, 2, 5), Stream.HANDOFF) == (7, 2, 5, 3)


@pytest.fixture
def asked(monkeypatch):
    """How often each stream was asked for: those that are used, not those that a test thinks of."""
    counts, real = Counter(), np.random.default_rng

    def default_rng(key):
        counts[state_of(key)] += 1
        return real(key)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    return counts


@pytest.mark.parametrize("prefix_mix", ["sequence", "handoff", "token"])
def test_writers_ask_for_each_stream_once(asked, student, teacher, prefix_mix):
    prompts = [
        Prompt(example=Example(id=str(i), prompt="prompt"), token_ids=(1, 5 + i)) for i in range(8)
    ]
    engines = {"student": NativeEngine(student.model), "teacher": NativeEngine(teacher.model)}
    objective = Objective(prefix="mixed", prefix_mix=prefix_mix, handoff_tokens=(2, 5))
    writing = Writing(
        objective=objective,
        engines=engines,
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


def states_of(stream: Stream, numbers: Iterable[tuple[int, ...]]) -> set[tuple[int, ...]]:
    return {state_of(stream_key(rollout, stream)) for rollout in numbers}


def test_an_evaluation_asks_for_streams_of_its_own(asked, student):
    settings = Evaluation(
        source="multiplication", num_problems=3, num_responses=2, max_tokens=4, seed=7
    )
    task, examples, prompts = prepare_problems(student, settings)
    write_responses(
        student,
        settings,
        1.0,
        task=task,
        examples=examples,
        prompts=prompts,
        end_ids=(2,),
        engine=NativeEngine(student.model),
        quiet=True,
    )
    numbers = itertools.product((7,), range(3), range(2))
    assert asked == Counter(states_of(Stream.EVALUATION, numbers))


COMMANDS = {
    "chat": (Stream.CHAT, ("--max-tokens", "2")),
    "sample": (Stream.SAMPLE, ("--num", "2", "--max-tokens", "2")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_asks_for_streams_of_its_own(asked, monkeypatch, command):
    stream, options = COMMANDS[command]
    monkeypatch.setattr("sys.stdin", io.StringIO("12*3=\n12*4=\n"))
    main([command, "potstill:base", "--seed", "7", *options])
    of_check = states_of(Stream.MODEL_CHECK, itertools.product((0,), (0,), range(3)))
    assert asked == Counter(of_check | states_of(stream, [(7, 0, 0), (7, 1, 0)]))
