"""The prompts of each step and the random streams, from the seed and the number of finished steps alone."""

import hashlib
import random


def step_indices(num_prompts: int, per_step: int, step: int, seed: int) -> list[int]:
    """The prompts of a step: consecutive places in an endless sequence of shuffled epochs."""
    order: dict[int, list[int]] = {}
    indices = []
    for place in range(step * per_step, (step + 1) * per_step):
        epoch, i = divmod(place, num_prompts)
        if epoch not in order:
            order[epoch] = random.Random(f"epoch/{seed}/{epoch}").sample(range(num_prompts), num_prompts)
        indices.append(order[epoch][i])
    return indices


def step_seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8]) >> 1
