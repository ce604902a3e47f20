"""Several data sources with weights: which prompts a step takes of which.

An epoch has as many places as there are prompts. Each source has its share of them, in an order
that is drawn for the epoch. A source's prompts fill its places in passes: each pass is a new order
of all of them, so that none comes again before every other has come. Where an epoch's share is no
whole number, epochs take turns, and after any number of them each source is within one place of its
share. All follows from the seed and the number of the step, as for one source.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from potstill.seeds import step_indices
from potstill.types import DataError, Prompt


@dataclass(frozen=True)
class Mixture:
    """The places of each source's prompts among those of the run, and its share of what is trained
    on."""

    places: tuple[tuple[int, ...], ...]
    shares: tuple[Fraction, ...]

    @property
    def epoch_size(self) -> int:
        return sum(map(len, self.places))


def make_mixture(
    prompts: Sequence[Prompt], weights: Sequence[float | None], names: Sequence[str]
) -> Mixture | None:
    """The mixture of prompts by the weights of their sources; None where these have none.

    Raises DataError for a source of which no prompt is left, and for a share of less than one place
    an epoch.
    """
    if None in weights or not weights:
        return None
    places: list[list[int]] = [[] for _ in names]
    for place, prompt in enumerate(prompts):
        places[prompt.example.source].append(place)
    # A weight is what is written: 0.1 is a tenth.
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    for name, mine, share in zip(names, places, shares, strict=True):
        if not mine:
            raise DataError(
                f"data source {name!r} has a weight and no prompt is left of it to train on; take "
                "it out of data.sources, or give it more prompts"
            )
        if share * len(prompts) < 1:
            raise DataError(
                f"data source {name!r} has {float(share):.3g} of the weights, which is less than "
                f"one of the {len(prompts):,} prompts of an epoch; raise its weight or take it out"
            )
    return Mixture(tuple(map(tuple, places)), tuple(shares))


def step_places(
    num_prompts: int, mixture: Mixture | None, per_step: int, step: int, seed: int
) -> list[int]:
    """The places of a step's prompts among those of the run."""
    if mixture is None:
        return step_indices(num_prompts, per_step, step, seed)
    epochs: dict[int, list[tuple[int, int]]] = {}
    passes: dict[tuple[int, int], list[int]] = {}
    found = []
    for place in range(step * per_step, (step + 1) * per_step):
        epoch, i = divmod(place, mixture.epoch_size)
        if epoch not in epochs:
            epochs[epoch] = _uses(mixture, epoch, seed)
        source, use = epochs[epoch][i]
        pass_, j = divmod(use, len(mixture.places[source]))
        if (source, pass_) not in passes:
            passes[source, pass_] = _shuffled(
                f"source/{seed}/{source}/{pass_}", mixture.places[source]
            )
        found.append(passes[source, pass_][j])
    return found


def _uses(mixture: Mixture, epoch: int, seed: int) -> list[tuple[int, int]]:
    """For each place of an epoch its source, and how many places that source had before."""
    before, after = _num_uses(mixture, epoch), _num_uses(mixture, epoch + 1)
    nexts = list(before)
    labels = []
    for source, (first, last) in enumerate(zip(before, after, strict=True)):
        labels += [source] * (last - first)
    uses = []
    for source in _shuffled(f"mixture/{seed}/{epoch}", labels):
        uses.append((source, nexts[source]))
        nexts[source] += 1
    return uses


def _num_uses(mixture: Mixture, num_epochs: int) -> list[int]:
    """The places that each source has in the first epochs: what lies between two bounds, which are
    the shares added up, times all places, rounded down."""
    bounds, total = [0], Fraction(0)
    for share in mixture.shares:
        total += share
        bounds.append(math.floor(total * mixture.epoch_size * num_epochs))
    return [high - low for low, high in itertools.pairwise(bounds)]


def _shuffled(name: str, items: Sequence[int]) -> list[int]:
    return random.Random(name).sample(items, len(items))
