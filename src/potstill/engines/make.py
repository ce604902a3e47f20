"""The engine that a recipe asks for, around a model."""

import shutil
from pathlib import Path

from potstill.config import Recipe
from potstill.engines.native import NativeEngine
from potstill.engines.of_ranks import EngineOfRanks
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
    with its first completion; each rank has one of its own, and one at a URL is all ranks'.
    `max_tokens` are those of the longest prompt with its completion."""
    if recipe.rollouts.engine == "native":
        return NativeEngine(model, is_another)
    from potstill.engines.vllm import VllmEngine

    spec, is_shared = recipe.engine, recipe.engine.url is not None and world.size > 1
    if is_shared and not world.is_main:
        return EngineOfRanks(model, None, world)
    name = writer if world.size == 1 else f"{writer}-{world.rank}"
    dtype = str(model.dtype).removeprefix("torch.")
    engine = VllmEngine(model, spec, folder / name, dtype=dtype, max_tokens=max_tokens)
    return EngineOfRanks(model, engine, world) if is_shared else engine


def engine_of_rank_0(engine: Engine) -> Engine:
    """The engine by which rank 0 writes without the others."""
    if isinstance(engine, EngineOfRanks):
        assert engine.alone is not None, "rank 0 has it"
        return engine.alone
    return engine


def refuse_missing_program(recipe: Recipe) -> None:
    """Raise EngineError where the engine's program is not here."""
    python = recipe.engine.python
    is_started = recipe.rollouts.engine != "native" and recipe.engine.url is None
    if is_started and shutil.which(python) is None:
        raise EngineError(
            f"engine.python is {python!r}, which is no program here; name the interpreter of an "
            "environment that has vLLM (docs/engines.md says how to make one)"
        )
