"""Positions whose rotation follows the longest row of a batch (longrope), so that a row depends on
its neighbours."""

from collections.abc import Sequence

from potstill.teachers.protocol import Teacher
from potstill.types import ModelError


def borders(config) -> list[int]:
    """The lengths in tokens beyond which an architecture rotates all rows of a batch in another
    way."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer.
    kinds = (
        [parameters]
        if "rope_type" in parameters
        else [each for each in parameters.values() if each]
    )
    return [
        kind["original_max_position_embeddings"]
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]


def refuse_crossing(
    model: Teacher, prompts: Sequence[Sequence[int]], max_tokens: int, field: str
) -> None:
    """Raise ModelError unless all rows stay on one side of the border, from the first to the last
    token.

    `prompts` are token ids, `max_tokens` is how many may follow them, and `field` is what sets
    that. A cache reads nothing.
    """
    if model.config is None:
        return
    lengths = sorted(map(len, prompts))
    for border in borders(model.config.get_text_config()):
        # The last token is never read.
        if lengths and lengths[0] <= border < lengths[-1] + max_tokens - 1:
            raise ModelError(
                f"model {model.name!r} rotates positions by the longest row of a batch "
                f"(longrope): in one way up to {border} tokens and in another beyond. Prompts of "
                f"{lengths[0]} to {lengths[-1]} tokens with up to {max_tokens} after them are on "
                f"both sides, and what a row gives would depend on the others; lower {field} or "
                "choose prompts of one side"
            )
