"""Prefix sources: who writes the completions that both models are conditioned on.

Prefixes are constants in every objective: no gradient goes through how they were written.
"""

from collections.abc import Callable, Sequence

from potstill.config import Recipe
from potstill.sampling import sample
from potstill.types import PrefixSource, Prompt, Rollout

# From (decoder, prompts, seeds, window, end_ids, recipe) to rollouts; decoder writes for "teacher" and "student".
Source = Callable[..., list[Rollout]]


def from_model(source: PrefixSource, model, prompts: Sequence[Prompt], seeds, window: int, end_ids, recipe: Recipe):
    """Let a model write after each prompt, up to `window` tokens. Every token is a loss token."""
    completions = sample(
        model,
        [prompt.token_ids for prompt in prompts],
        seeds,
        max_tokens=window,
        end_ids=end_ids,
        sampling=recipe.sampling,
    )
    return [
        Rollout(prompt, completion.token_ids, (True,) * len(completion.token_ids), source, completion.stop)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def from_dataset(source: PrefixSource, model, prompts: Sequence[Prompt], seeds, window: int, end_ids, recipe: Recipe):
    """Take the completions that come with the data, up to `window` tokens of each."""
    rollouts = []
    for prompt in prompts:
        assert prompt.completion_ids is not None and prompt.trained is not None, "make_prompts checks this"
        stop = "end" if len(prompt.completion_ids) <= window else "length"
        rollouts.append(Rollout(prompt, prompt.completion_ids[:window], prompt.trained[:window], source, stop))
    return rollouts


SOURCES: dict[PrefixSource, Source] = {"teacher": from_model, "student": from_model, "dataset": from_dataset}


def write_rollouts(
    source: PrefixSource,
    decoders: dict[str, object],
    prompts: Sequence[Prompt],
    seeds,
    window: int,
    end_ids,
    recipe: Recipe,
) -> list[Rollout]:
    """One rollout for each prompt by the given source. `decoders` holds the models that can write, by source."""
    return SOURCES[source](source, decoders.get(source), prompts, seeds, window, end_ids, recipe)
