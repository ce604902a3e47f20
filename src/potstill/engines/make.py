"""The engine that a recipe asks for, around a model."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from potstill.config import EngineSpec, Recipe
from potstill.engines.native import NativeEngine
from potstill.engines.of_ranks import EngineOfRanks
from potstill.engines.protocol import Engine, EngineError
from potstill.engines.remote import RemoteEngine
from potstill.engines.shared import OwnWeights, Weights, WeightsOfRanks
from potstill.models import distributed
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel
from potstill.teachers.remote.states import RemoteDecoder
from potstill.types import Writer


def make_engine(
    recipe: Recipe,
    model,
    writer: Writer,
    *,
    folder: Path,
    max_tokens: int,
    world: World,
    student: LanguageModel | None = None,
    is_another: bool = False,
) -> Engine:
    """The engine of one writer. A server of vLLM begins with its first completion; each rank has
    one of its own, and one at a URL is all ranks'. `max_tokens` are those of the longest prompt
    with its completion.

    The model may be a copy of `student`, in another type where `is_another`; an empty copy is for a
    server, which gets the student's weights.
    """
    if recipe.rollouts.engine == "native" or isinstance(model, RemoteDecoder):
        return own_engine(model, is_another)
    is_shared = recipe.engine.url is not None and world.size > 1
    place = folder / (writer if world.size == 1 else f"{writer}-{world.rank}")
    if student is None or world.size == 1:
        weights = OwnWeights(model, place, student)
    else:
        is_here = world.is_main if is_shared else distributed.is_first_here()
        weights = WeightsOfRanks(model, place, student, world, is_here=is_here)
    if is_shared and not world.is_main:
        return EngineOfRanks(model, None, world, weights)
    engine = _vllm(recipe.engine, model, place, max_tokens, weights)
    return EngineOfRanks(model, engine, world, weights) if is_shared else engine


def _vllm(
    spec: EngineSpec, model, folder: Path, max_tokens: int, weights: Weights | None = None
) -> Engine:
    from potstill.engines.vllm import VllmEngine

    dtype = str(model.dtype).removeprefix("torch.")
    return VllmEngine(model, spec, folder, dtype=dtype, max_tokens=max_tokens, weights=weights)


def own_engine(model, is_another: bool = False) -> Engine:
    """The engine of a model where it is: this process, or the server that has it."""
    if isinstance(model, RemoteDecoder):
        return RemoteEngine(model)
    return NativeEngine(model, is_another)


@contextmanager
def engine_for(
    given: Engine | EngineSpec | None, model, *, folder: Path | None, max_tokens: int
) -> Iterator[Engine]:
    """The engine that is given, this process for None, or a server of vLLM for as long as this
    lasts, with its log in a folder that may be a passing one."""
    if not isinstance(given, EngineSpec) or isinstance(model, RemoteDecoder):
        yield given if given and not isinstance(given, EngineSpec) else own_engine(model)
        return
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = _vllm(given, model, place, max_tokens)
        stack.callback(engine.close)
        yield engine


def engine_of_rank_0(engine: Engine) -> Engine:
    """The engine by which rank 0 writes without the others."""
    if isinstance(engine, EngineOfRanks):
        assert engine.alone is not None, "rank 0 has it"
        return engine.alone
    return engine


def engine_spec(recipe: Recipe) -> EngineSpec | None:
    """The server that a recipe's completions come from; None where this process writes them."""
    return None if recipe.rollouts.engine == "native" else recipe.engine


def refuse_missing_program(spec: object) -> None:
    """Raise EngineError for a server whose program is not here, or that cannot sleep here; anything
    else needs none."""
    if isinstance(spec, EngineSpec) and spec.sleep and not torch.cuda.is_available():
        raise EngineError("engine.sleep is true and there is no CUDA here, which it is for")
    if isinstance(spec, EngineSpec) and spec.url is None and shutil.which(spec.python) is None:
        raise EngineError(
            f"engine.python is {spec.python!r}, which is no program here; name the interpreter of "
            "an environment that has vLLM (docs/engines.md says how to make one)"
        )
