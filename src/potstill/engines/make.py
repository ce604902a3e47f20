"""The engine that a recipe asks for, around a model."""

from pathlib import Path

from potstill.config import Recipe
from potstill.engines.native import NativeEngine
from potstill.engines.protocol import Engine
from potstill.models.distributed import World
from potstill.types import Writer


def make_engine(
    recipe: Recipe, model, writer: Writer, *, folder: Path, max_tokens: int, world: World
) -> Engine:
    """The engine of one writer. A server of vLLM begins with its first completion; each rank has
    one of its own. `max_tokens` are those of the longest prompt with its completion."""
    if recipe.rollouts.engine == "native":
        return NativeEngine(model)
    from potstill.engines.vllm import VllmEngine

    name = writer if world.size == 1 else f"{writer}-{world.rank}"
    dtype = str(model.dtype).removeprefix("torch.")
    return VllmEngine(model, recipe.engine, folder / name, dtype=dtype, max_tokens=max_tokens)
