"""The prompts of each step and the random streams, from the seed and the number of finished steps
alone."""

import hashlib
import random
from enum import IntEnum

# The seed of one of numpy's generators. A rollout is named by (seed of the run, round, place in the
# round); `stream_key` makes the keys of its random streams.
Key = tuple[int, ...]


class Stream(IntEnum):
    """Uses of random numbers, each with streams of its own.

    The numbers are part of what a seed means: one that changes changes every run. A new use takes a
    new number.
    """

    TOKENS = 0
    """Draws the tokens of a rollout, or of its first writer."""
    TURNS = 1
    """Says which of two models writes each token."""
    SECOND_WRITER = 2
    """Draws the tokens of the model that takes over."""
    HANDOFF = 3
    """Says where the second model takes over."""
    PROBE = 4
    """Draws the tokens of the length gate's probes, whose rounds are steps."""
    START = 5
    """Draws the tokens of the check that a run with a reward begins with."""
    VALIDATION = 6
    """Draws the tokens of validations, which are the same for all seeds: their first numbers are
    zeros."""
    PLACES = 7
    """Says which places of a round the student writes; drawn once a round, at its first place."""
    EVALUATION = 8
    """Draws the tokens of an evaluation: a problem stands for a round, a response for a place."""
    CHAT = 9
    """Draws the tokens of a chat's answers: a turn stands for a round, whose place is 0."""
    SAMPLE = 10
    """Draws the tokens of `potstill sample`: a prompt's number stands for a round."""
    MODEL_CHECK = 11
    """Draws the tokens with which a loaded model's decoding is examined, whatever the seed."""


def stream_key(rollout: Key, stream: Stream) -> Key:
    """The key of one of a rollout's random streams."""
    return rollout if stream is Stream.TOKENS else (*rollout, int(stream))


def step_indices(num_prompts: int, per_step: int, step: int, seed: int) -> list[int]:
    """The prompts of a step: consecutive places in an endless sequence of shuffled epochs."""
    order: dict[int, list[int]] = {}
    indices = []
    for place in range(step * per_step, (step + 1) * per_step):
        epoch, i = divmod(place, num_prompts)
        if epoch not in order:
            order[epoch] = random.Random(f"epoch/{seed}/{epoch}").sample(
                range(num_prompts), num_prompts
            )
        indices.append(order[epoch][i])
    return indices


def step_seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8]) >> 1
