"""The engine that a recipe asks for, around a model."""

import shutil
from pathlib import Path

from potstill.config import Recipe
from potstill.engines.native import NativeEngine
from potstill.engines.protocol import Engine, EngineError
from potstill.models.distributed import World
from potstill.types import Writer


def make_engine(
    recipe: Recipe,
    model,
    writer: Writer,
    *,
    folder: Path,
    max_tokens: int,
    world: World,
    is_another: bool = False,
) -> Engine:
    """The engine of one writer, whose model may be a copy in another type. A server of vLLM begins
    with its first completion; each rank has one of its own. `max_tokens` are those of the longest
    prompt with its completion."""
    if recipe.rollouts.engine == "native":
        return NativeEngine(model, is_another)
    from potstill.engines.vllm import VllmEngine

    name = writer if world.size == 1 else f"{writer}-{world.rank}"
    dtype = str(model.dtype).removeprefix("torch.")
    return VllmEngine(model, recipe.engine, folder / name, dtype=dtype, max_tokens=max_tokens)


def refuse_missing_program(recipe: Recipe) -> None:
    """Raise EngineError where the engine's program is not here."""
    python = recipe.engine.python
    is_started = recipe.rollouts.engine != "native" and recipe.engine.url is None
    if is_started and shutil.which(python) is None:
        raise EngineError(
            f"engine.python is {python!r}, which is no program here; name the interpreter of an "
            "environment that has vLLM (docs/engines.md says how to make one)"
        )
