"""Prefix sources: who writes the completions that both models are conditioned on.

Prefixes are constants in every objective: no gradient goes through how they were written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.config import Sampling
from potstill.sampling import sample
from potstill.types import PrefixSource, Prompt, Rollout


@dataclass(frozen=True)
class Writing:
    """How completions are written: by which source and model (None for a data set), how far, until what, and how."""

    source: PrefixSource
    model: Any
    window: int
    end_ids: tuple[int, ...]
    sampling: Sampling


Seed = tuple[int, ...]


def from_model(writing: Writing, prompts: Sequence[Prompt], seeds: Sequence[Seed]) -> list[Rollout]:
    """Let the model write after each prompt, up to the window. Every token is a loss token."""
    completions = sample(
        writing.model,
        [prompt.token_ids for prompt in prompts],
        seeds,
        max_tokens=writing.window,
        end_ids=writing.end_ids,
        sampling=writing.sampling,
    )
    return [
        Rollout(prompt, completion.token_ids, (True,) * len(completion.token_ids), writing.source, completion.stop)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def from_dataset(writing: Writing, prompts: Sequence[Prompt], seeds: Sequence[Seed]) -> list[Rollout]:
    """Take the completions that come with the data, up to the window of each."""
    rollouts = []
    for prompt in prompts:
        assert prompt.completion_ids is not None and prompt.trained is not None, "make_prompts checks this"
        stop = "end" if len(prompt.completion_ids) <= writing.window else "length"
        ids, trained = prompt.completion_ids[: writing.window], prompt.trained[: writing.window]
        rollouts.append(Rollout(prompt, ids, trained, writing.source, stop))
    return rollouts


SOURCES: dict[PrefixSource, Callable[[Writing, Sequence[Prompt], Sequence[Seed]], list[Rollout]]] = {
    "teacher": from_model,
    "student": from_model,
    "dataset": from_dataset,
}


def write_rollouts(writing: Writing, prompts: Sequence[Prompt], seeds: Sequence[Seed]) -> list[Rollout]:
    """One rollout for each prompt; `seeds` name the random stream of each."""
    return SOURCES[writing.source](writing, prompts, seeds)
