"""Prefix sources: who writes the completions that both models are conditioned on.

Prefixes are constants in every objective: no gradient goes through how they were written. So a
mixture of writers needs no importance weights: it chooses the states at which the divergence is
minimised, and the divergence at a state does not depend on how one got there. (MiniLLM, arXiv
2306.08543, weighs its teacher-mixed samples because they stand in for the student's in a policy
gradient, which differentiates how states are reached.)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.config import Objective, Sampling
from potstill.engines.native import NativeEngine
from potstill.engines.protocol import Engine
from potstill.models.sampling import OtherWriter, sample
from potstill.seeds import Key, Stream, stream_key
from potstill.teachers.store import Cache
from potstill.types import Prompt, Rollout, Stop, Writer


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How completions are written: by which source, with which engines, how far, until what, and
    how.

    `vocab_size` is that of the loss: what is drawn is drawn from the rows that both heads share.
    With a `cache` they are there already. With `stores_log_probs` rollouts are to be in one.
    `on_token` is told of each token that is drawn, as `sample` does.
    """

    objective: Objective
    engines: Mapping[Writer, Engine]
    window: int
    end_ids: tuple[int, ...]
    sampling: Sampling
    rollouts_per_step: int
    vocab_size: int | None = None
    cache: Cache | None = None
    stores_log_probs: bool = False
    on_token: Callable[[int, int], None] = lambda place, token_id: None

    @property
    def keeps_log_probs(self) -> bool:
        """Whether rollouts are to say from which log-probabilities they were drawn."""
        return self.stores_log_probs or any(engine.is_another for engine in self.engines.values())


def from_one(
    writer: Writer, writing: Writing, prompts: Sequence[Prompt], seeds: Sequence[Key]
) -> list[Rollout]:
    """Let one model write after each prompt, up to the window. Every token is a loss token."""
    engine = writing.engines[writer]
    completions = engine.write(
        [prompt.ids_of(writer) for prompt in prompts],
        seeds,
        max_tokens=writing.window,
        end_ids=writing.end_ids,
        sampling=writing.sampling,
        vocab_size=writing.vocab_size,
        on_token=writing.on_token,
    )
    rollouts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        writers = (writer,) * len(completion.token_ids)
        rollout = written_rollout(prompt, completion.token_ids, writers, completion.stop)
        if writing.keeps_log_probs:
            rollout = dataclasses.replace(rollout, engine_log_probs=completion.log_probs)
        rollouts.append(rollout)
    return rollouts


def now_or_before(
    writer: Writer, writing: Writing, prompts: Sequence[Prompt], seeds: Sequence[Key]
) -> list[Rollout]:
    """Rollouts that one model writes now, or has written into the cache."""
    if writing.cache is None:
        return from_one(writer, writing, prompts, seeds)
    return [writing.cache.rollout(prompt, writing.window) for prompt in prompts]


def from_dataset(
    writing: Writing, prompts: Sequence[Prompt], seeds: Sequence[Key]
) -> list[Rollout]:
    """Take the completions that come with the data, up to the window of each."""
    rollouts = []
    for prompt in prompts:
        assert prompt.completion_ids is not None and prompt.trained is not None, (
            "make_prompts checks this"
        )
        stop = "end" if len(prompt.completion_ids) <= writing.window else "length"
        ids, trained = prompt.completion_ids[: writing.window], prompt.trained[: writing.window]
        rollouts.append(
            Rollout(
                prompt=prompt,
                completion_ids=ids,
                trained=trained,
                writers=("dataset",) * len(ids),
                stop=stop,
            )
        )
    return rollouts


def by_sequence(writing: Writing, prompts: Sequence[Prompt], seeds: Sequence[Key]) -> list[Rollout]:
    """An exact share of each set of rollouts is the student's, in shuffled places; the rest is the
    teacher's."""
    share = writing.objective.student_share
    rollouts: dict[int, Rollout] = {}
    writers: tuple[Writer, Writer] = ("teacher", "student")
    for writer in writers:
        mine = [
            i
            for i, (seed, round_, place) in enumerate(seeds)
            if (place in student_places(writing.rollouts_per_step, share, seed, round_))
            == (writer == "student")
        ]
        if mine:
            written = from_one(
                writer, writing, [prompts[i] for i in mine], [seeds[i] for i in mine]
            )
            rollouts |= dict(zip(mine, written, strict=True))
    return [rollouts[i] for i in range(len(prompts))]


def student_places(num_places: int, share: float, seed: int, round_: int) -> frozenset[int]:
    """Which places of a set the student writes: as many as bring the total of all sets so far to
    its share, rounded."""
    before, after = (round(share * num_places * (round_ + done)) for done in (0, 1))
    key = stream_key((seed, round_, 0), Stream.PLACES)
    order = np.random.default_rng(key).permutation(num_places)
    return frozenset(order[: after - before].tolist())


def by_handoff(writing: Writing, prompts: Sequence[Prompt], seeds: Sequence[Key]) -> list[Rollout]:
    """One model writes the first m tokens, m drawn evenly from a range, and the other goes on
    unless it has ended."""
    objective = writing.objective
    first: Writer = objective.first_writer
    second: Writer = "student" if first == "teacher" else "teacher"
    names = ("end_ids", "sampling", "vocab_size", "on_token")
    options: dict[str, Any] = {name: getattr(writing, name) for name in names}
    caps = [_handoff_place(seed, objective.handoff_tokens) for seed in seeds]
    begun = writing.engines[first].write(
        [p.ids_of(first) for p in prompts], seeds, max_tokens=caps, **options
    )
    open_rows = [i for i, part in enumerate(begun) if part.stop == "length"]
    ended = writing.engines[second].write(
        [prompts[i].ids_of(second) + begun[i].token_ids for i in open_rows],
        [stream_key(seeds[i], Stream.SECOND_WRITER) for i in open_rows],
        max_tokens=[writing.window - caps[i] for i in open_rows],
        **options,
    )
    rest = dict(zip(open_rows, ended, strict=True))
    rollouts = []
    for i, (prompt, part) in enumerate(zip(prompts, begun, strict=True)):
        tail = rest[i].token_ids if i in rest else ()
        writers = (first,) * len(part.token_ids) + (second,) * len(tail)
        rollout = written_rollout(
            prompt, part.token_ids + tail, writers, rest[i].stop if i in rest else part.stop
        )
        if writing.keeps_log_probs:
            log_probs = part.log_probs + (rest[i].log_probs if i in rest else ())
            rollout = dataclasses.replace(rollout, engine_log_probs=log_probs)
        rollouts.append(rollout)
    return rollouts


def _handoff_place(seed: Key, handoff_tokens: tuple[int, int]) -> int:
    """How many tokens of a rollout its first writer may write, drawn evenly from the range."""
    low, high = handoff_tokens
    return int(np.random.default_rng(stream_key(seed, Stream.HANDOFF)).integers(low, high + 1))


def by_token(writing: Writing, prompts: Sequence[Prompt], seeds: Sequence[Key]) -> list[Rollout]:
    """Each token is drawn from the mixture of both models' distributions."""
    student, teacher = writing.engines["student"], writing.engines["teacher"]
    assert isinstance(student, NativeEngine) and isinstance(teacher, NativeEngine), (
        "the recipe refuses other engines"
    )
    completions = sample(
        teacher.model,
        [prompt.ids_of("teacher") for prompt in prompts],
        seeds,
        max_tokens=writing.window,
        end_ids=writing.end_ids,
        sampling=writing.sampling,
        vocab_size=writing.vocab_size,
        on_token=writing.on_token,
        other=OtherWriter(
            model=student.model,
            prompts=[prompt.ids_of("student") for prompt in prompts],
            share=writing.objective.student_share,
            seeds=[stream_key(seed, Stream.TURNS) for seed in seeds],
        ),
    )
    names: tuple[Writer, Writer] = ("teacher", "student")
    return [
        written_rollout(
            prompt,
            completion.token_ids,
            tuple(names[m] for m in completion.models),
            completion.stop,
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def written_rollout(
    prompt: Prompt, token_ids: tuple[int, ...], writers: tuple[Writer, ...], stop: Stop
) -> Rollout:
    """A rollout whose tokens are all trained on."""
    return Rollout(
        prompt=prompt,
        completion_ids=token_ids,
        trained=(True,) * len(token_ids),
        writers=writers,
        stop=stop,
    )


SOURCES: dict[str, Callable[[Writing, Sequence[Prompt], Sequence[Key]], list[Rollout]]] = {
    "teacher": lambda *given: now_or_before("teacher", *given),
    "student": lambda *given: now_or_before("student", *given),
    "dataset": from_dataset,
    "mixed/sequence": by_sequence,
    "mixed/handoff": by_handoff,
    "mixed/token": by_token,
}


def write_rollouts(
    writing: Writing, prompts: Sequence[Prompt], seeds: Sequence[Key]
) -> list[Rollout]:
    """One rollout for each prompt; `seeds` name the random stream of each."""
    objective = writing.objective
    name = f"mixed/{objective.prefix_mix}" if objective.prefix == "mixed" else objective.prefix
    return SOURCES[name](writing, prompts, seeds)
