"""A model's weights as files that another process of this machine reads, in memory where there is
room.

They are written layer by layer. Of a student that ranks share, a layer is gathered to be written,
so that no rank has all of it.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from potstill.console.quiet import without_progress_bars
from potstill.models import distributed
from potstill.models.adapters import has_adapter, merged_weights
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel

SHARED_MEMORY, FOLDERS = Path("/dev/shm"), "potstill-weights-"


class Weights(Protocol):
    """The weights of a model for a server."""

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        ...

    def renew(self, version: int) -> None:
        """Let files be of the weights that the model has now."""
        ...

    @contextmanager
    def files(self) -> Iterator[Path]:
        """A folder with the weights, as checkpoints have them, for as long as this lasts."""
        ...

    def close(self) -> None:
        """Remove what is still there."""
        ...


class OwnWeights:
    """The weights of a model that is whole on this rank, or of a student whose empty copy the model
    is; they are written whenever a server asks."""

    def __init__(self, model: Any, place: Path, student: LanguageModel | None = None):
        self.model, self.place, self.student = model, place, student

    @property
    def device(self) -> torch.device:
        return self.model.device if self.student is None else self.student.device

    def renew(self, version: int) -> None:
        pass

    @contextmanager
    def files(self) -> Iterator[Path]:
        with _folder(self.model, self.place) as folder:
            _write(self.model, self.student, folder)
            yield folder

    def close(self) -> None:
        pass


class WeightsOfRanks:
    """The weights of a student that ranks share, whose empty copy the model is.

    The files are written while all ranks are there, and kept until the next ones, as a server may
    die while one rank writes completions. The ranks of a machine read those of its first one.
    """

    def __init__(
        self, model: Any, place: Path, student: LanguageModel, world: World, *, is_here: bool
    ):
        """`is_here` says whether this rank writes files."""
        self.model, self.place, self.student, self.world = model, place, student, world
        self.is_here, self.device = is_here, world.device
        self.version: int | None = None
        self.found: Path | None = None
        self.stack = ExitStack()

    def renew(self, version: int) -> None:
        """As the protocol says. Every rank must call this."""
        if version == self.version:
            return
        self.stack.close()
        self.found = None
        if self.is_here:
            self.found = self.stack.enter_context(_folder(self.model, self.place))
        _write(self.model, self.student, self.found)
        # Ranks are numbered machine by machine.
        found = distributed.gather(self.found, self.world)[: self.world.rank + 1]
        self.found = next((each for each in reversed(found) if each is not None), None)
        self.version = version

    @contextmanager
    def files(self) -> Iterator[Path]:
        assert self.found is not None, "renew comes first"
        yield self.found

    def close(self) -> None:
        self.stack.close()


def has_room(num_bytes: int) -> bool:
    """Whether files of this size fit into the shared memory."""
    return SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > num_bytes


@contextmanager
def _folder(model: Any, fallback: Path) -> Iterator[Path]:
    """A folder for the weights of a model for as long as this lasts: in the shared memory, or in
    the folder `fallback` where that has no room."""
    num_bytes = sum(each.numel() * each.element_size() for each in model.parameters())
    place = SHARED_MEMORY if has_room(num_bytes) else fallback
    place.mkdir(parents=True, exist_ok=True)
    _remove_left(place)
    folder = Path(tempfile.mkdtemp(prefix=FOLDERS, dir=place))
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(model: Any, student: LanguageModel | None, folder: Path | None) -> None:
    """Write the weights by their names in checkpoints, a file a layer, an adapter's merged. An
    empty model has the student's meanwhile; without a folder this rank only takes part."""
    for number, names in enumerate(distributed.names_by_layer(model)):
        with ExitStack() as stack:
            if student is not None:
                is_here = folder is not None
                stack.enter_context(
                    distributed.with_weights(model, student, names, is_here=is_here)
                )
            if folder is not None:
                _save(model, names, folder, f"{number:05d}")


def _save(model: Any, names: list[str], folder: Path, prefix: str) -> None:
    """Write the weights of some names, a tied head under its own name too.

    vLLM keeps a packed copy of it on a CPU, which only a weight of that name renews.
    """
    if has_adapter(model):
        weights = merged_weights(model, names)
    else:
        weights = {name: weight for name, weight in model.state_dict().items() if name in names}
    part = folder / prefix
    # By itself transformers writes on rank 0 alone.
    model.should_save_on_this_rank = lambda is_main_process: True
    try:
        with without_progress_bars():
            model.save_pretrained(part, state_dict=weights)
    finally:
        del model.should_save_on_this_rank
    for file in part.glob("*.safetensors"):
        file.rename(folder / f"{prefix}-{file.name}")
    shutil.rmtree(part)
    head = model.get_output_embeddings()
    own = {name for name, _ in model.named_parameters()}
    tied = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    for name in tied:
        if name in names and name not in own:
            # Sorted after the file of the weights that it is tied to.
            save_file({name: head.weight.detach()}, folder / f"{prefix}-tied.safetensors")


def _remove_left(place: Path) -> None:
    """Remove the folders that killed processes have left: nobody holds their locks."""
    for folder in place.glob(f"{FOLDERS}*"):
        try:
            with FileLock(folder / ".lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue
