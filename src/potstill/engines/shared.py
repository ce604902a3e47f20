"""A model's weights as files that another process of this machine reads, in memory where there is
room."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import nn

from potstill.console.quiet import without_progress_bars
from potstill.models.adapters import has_adapter, merged_weights

SHARED_MEMORY, FOLDERS = Path("/dev/shm"), "potstill-weights-"


def has_room(num_bytes: int) -> bool:
    """Whether files of this size fit into the shared memory."""
    return SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > num_bytes


@contextmanager
def written(model, fallback: Path) -> Iterator[Path]:
    """A folder with the model's weights, as a checkpoint has them, for as long as this lasts; in
    the folder `fallback` where the shared memory has no room."""
    num_bytes = sum(each.numel() * each.element_size() for each in model.parameters())
    place = SHARED_MEMORY if has_room(num_bytes) else fallback
    _remove_left(place)
    folder = Path(tempfile.mkdtemp(prefix=FOLDERS, dir=place))
    try:
        with FileLock(folder / ".lock", timeout=0):
            _save(model, folder)
            _add_tied_head(model, folder)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(model, folder: Path) -> None:
    """Write the weights by their names in checkpoints, an adapter's merged."""
    weights = merged_weights(model) if has_adapter(model) else None
    # By itself transformers writes on rank 0 alone, and each rank has a server of its own.
    model.should_save_on_this_rank = lambda is_main_process: True
    try:
        with without_progress_bars():
            model.save_pretrained(folder, state_dict=weights)
    finally:
        del model.should_save_on_this_rank


def _add_tied_head(model, folder: Path) -> None:
    """Write a tied head under its own name too.

    vLLM keeps a packed copy of it on a CPU, which only a weight of that name renews.
    """
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    weights: dict[str, nn.Parameter] = dict(model.named_parameters())
    if names and f"{names[0]}.weight" not in weights:
        # Sorted after the files of the other weights.
        save_file({f"{names[0]}.weight": head.weight.detach()}, folder / "tied_head.safetensors")


def _remove_left(place: Path) -> None:
    """Remove the folders that killed processes have left: nobody holds their locks."""
    for folder in place.glob(f"{FOLDERS}*"):
        try:
            with FileLock(folder / ".lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue
