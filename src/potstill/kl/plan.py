"""Plan of a pass: tile sizes within the memory budget, and the backend that fills the tiles."""

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from potstill.kl import tiles
from potstill.kl.tiles import Backend

# Rows: fewer make matrix products 5 to 20 % slower on the CPU measured (docs/performance.md), more
# gain nothing. Columns: as many as leave a pair of tiles in 6 MiB.
CPU_TILE = (256, 3072)
# A pair of tiles then fills the cache between the matrix products that write and read it.
GPU_ROWS = 2048


class Plan(NamedTuple):
    """How the work is cut: tiles of `rows` x `columns`, `group_rows` between the passes,
    `num_resident` tiles kept."""

    rows: int
    columns: int
    group_rows: int
    num_resident: int


def make_plan(
    num_rows: int,
    vocab_size: int,
    budget: int,
    *,
    itemsize: int = 4,
    device: torch.device | None = None,
    one_group: bool = False,
    tile: tuple[int, int] | None = None,
) -> Plan:
    """Cut N x V logits into tiles that fit the cache and groups of rows whose tiles fit the budget
    of bytes.

    `one_group` keeps all rows together, so that each tile of the head's gradient is finished at
    once; `tile` fixes the rows and columns of a tile.
    """
    if budget < 0:
        raise ValueError(
            f"the memory budget is {budget} bytes; give 0 (compute every tile twice) or more"
        )
    if tile is not None:
        rows, columns = tile
        if rows < 1 or columns < 1:
            raise ValueError(f"tile is {tile}; give at least one row and one column")
    elif device is not None and device.type == "cuda":
        elements = torch.cuda.get_device_properties(device).L2_cache_size // (2 * itemsize)
        rows, columns = GPU_ROWS, elements // GPU_ROWS
    else:
        rows, columns = CPU_TILE
    if tile is None:
        # A small vocabulary leaves room for more rows.
        rows = rows * max(columns // max(vocab_size, 1), 1)
    columns = min(columns, vocab_size)
    fitting = budget // (2 * itemsize * rows * vocab_size)
    num_blocks = math.ceil(num_rows / rows)
    # Groups no larger than stay whole; with little memory all rows at once, which reads the head
    # just once a pass.
    blocks = (
        num_blocks
        if one_group or 4 * budget < itemsize * rows * vocab_size
        else min(max(fitting, 1), num_blocks)
    )
    num_tiles = 2 * blocks * math.ceil(vocab_size / columns)
    return Plan(
        rows, columns, max(blocks, 1) * rows, min(budget // (itemsize * rows * columns), num_tiles)
    )


class Buffers(NamedTuple):
    """The tiles of a plan in memory: `num_resident` of `size` elements stay between the passes,
    beside one of each side. A group of rows has `num_tiles` of each side."""

    size: int
    num_resident: int
    num_tiles: int


def buffers_of(plan: Plan, num_rows: int, vocab_size: int, num_sides: int) -> Buffers:
    """The buffers that N x V logits of one or both models take."""
    num_tiles = math.ceil(plan.group_rows / plan.rows) * math.ceil(vocab_size / plan.columns)
    return Buffers(
        size=min(plan.rows, num_rows) * plan.columns,
        num_resident=min(plan.num_resident, num_sides * num_tiles),
        num_tiles=num_tiles,
    )


def find_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The tile functions of a backend. Raises ValueError for one that is unknown or cannot run on
    the device."""
    if name == "auto":
        name = "triton" if device.type == "cuda" else "eager"
    if name == "eager":
        return tiles.EAGER
    if name == "compiled":
        return tiles.compiled_backend()
    if name == "triton":
        try:
            from potstill.kl import triton_tiles
        except ImportError:
            raise ValueError(
                'backend is "triton", which is not installed; install triton or choose eager'
            ) from None
        if dtype != torch.float32:
            raise ValueError(
                f'backend is "triton", which computes in float32, and the inputs are {dtype}; '
                "choose eager"
            )
        return triton_tiles.triton_backend(device.type)
    raise ValueError(f"backend is {name!r}; choose auto, eager, compiled, triton or plain")


class Tile(NamedTuple):
    block: slice
    columns: slice
    z: Tensor
    y: Tensor | None
    rows: Tensor
    weight: Tensor


class Arena(threading.local):
    """The memory of resident tiles, kept for the thread's next call.

    Getting it anew from the system costs a CPU as much as the arithmetic on a tile. A GPU's
    allocator keeps it anyway.
    """

    flat: Tensor | None = None

    def buffers(
        self, count: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        if device.type != "cpu":
            return [torch.empty(size, dtype=dtype, device=device) for _ in range(count)]
        num_bytes = count * size * dtype.itemsize
        if self.flat is None or len(self.flat) < num_bytes:
            # The old one goes first, so that the two are never there together.
            self.flat = None
            self.flat = torch.empty(num_bytes, dtype=torch.uint8)
        return list(self.flat[:num_bytes].view(dtype).view(count, size))


ARENA = Arena()
