"""Devices by name: how fast each multiplies, reads and sends, and what it holds.

Peaks are of dense products, as their makers state them; `EFFICIENCY` says which share of a peak is
reckoned with. "this-machine" is measured when it is asked for.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from potstill.config import Sampling
from potstill.console.names import nearest
from potstill.models.language_model import load_model
from potstill.models.sampling import sample
from potstill.types import DataError

GIGA, TERA = 1e9, 1e12
# Shares of the peaks that are reckoned with: of products in training and scoring, of what is read
# from memory, and of what is sent. They are assumptions: no device of the table was measured.
EFFICIENCY = {"products": 0.45, "reading": 0.7, "sending": 0.7}
# Devices of a machine, which send to each other faster than to others.
DEVICES_PER_MACHINE = 8
HERE = "this-machine"
# Where a container says how much memory it may use, and uses.
LIMIT, USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
# Rows and columns of the matrices that are multiplied, the bytes of weights that are read, and the
# rows and tokens that are decoded, to measure.
MATRIX, READ_BYTES = 1024, 2**28
DRAWN_ROWS, DRAWN_TOKENS = 4, 16
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """`half` and `single` are operations a second of products in bfloat16 and float32, `reading`
    bytes a second from its memory of `memory` bytes, `near` and `far` bytes a second sent to a
    device of the same machine and of another, in one direction.

    `a_layer` is the time that a layer takes for one token at least, when every operation of it is
    started by itself; `is_measured` that no share of a peak is reckoned with.
    """

    name: str
    half: float
    single: float
    reading: float
    memory: float
    near: float
    far: float
    source: str
    a_layer: float = 0.7e-3
    is_cpu: bool = False
    is_measured: bool = False


# `far` is a network card of 400 Gbit/s for each device where machines have them, else one of 100.
_DEVICES = (
    DeviceSpec(
        name="H100-SXM",
        half=989 * TERA,
        single=67 * TERA,
        reading=3350 * GIGA,
        memory=80 * GIGA,
        near=450 * GIGA,
        far=50 * GIGA,
        source="NVIDIA H100 data sheet",
    ),
    DeviceSpec(
        name="H200",
        half=989 * TERA,
        single=67 * TERA,
        reading=4800 * GIGA,
        memory=141 * GIGA,
        near=450 * GIGA,
        far=50 * GIGA,
        source="NVIDIA H200 data sheet",
    ),
    DeviceSpec(
        name="A100-80GB",
        half=312 * TERA,
        single=19.5 * TERA,
        reading=2039 * GIGA,
        memory=80 * GIGA,
        near=300 * GIGA,
        far=25 * GIGA,
        source="NVIDIA A100 80GB SXM data sheet",
    ),
    DeviceSpec(
        name="L40S",
        half=362 * TERA,
        single=91.6 * TERA,
        reading=864 * GIGA,
        memory=48 * GIGA,
        near=32 * GIGA,
        far=12.5 * GIGA,
        source="NVIDIA L40S data sheet (PCIe 4.0 x16)",
    ),
    DeviceSpec(
        name="RTX-4090",
        half=165 * TERA,
        single=82.6 * TERA,
        reading=1008 * GIGA,
        memory=24 * GIGA,
        near=32 * GIGA,
        far=12.5 * GIGA,
        source="NVIDIA Ada architecture white paper (PCIe 4.0 x16)",
    ),
)
DEVICES = {device.name: device for device in _DEVICES}


def device_of(name: str) -> DeviceSpec:
    """A device of the table, or this machine, which is measured. Raises DataError for others."""
    if name == HERE:
        return measured_here()
    if name not in DEVICES:
        known = [*DEVICES, HERE]
        close = nearest(name, known, 0.4)
        hint = f"; the nearest is {close}" if close else ""
        raise DataError(f"--device is {name!r}; choose one of {', '.join(known)}{hint}")
    return DEVICES[name]


def measured_here() -> DeviceSpec:
    """The GPU of this machine, or without one its processor, on as many threads as torch has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cpu = device.type == "cpu"
    where = f"{torch.get_num_threads()} threads" if is_cpu else torch.cuda.get_device_name()
    reading = _reading(device)
    return DeviceSpec(
        name=HERE,
        half=_multiplying(device, torch.bfloat16),
        single=_multiplying(device, torch.float32),
        reading=reading,
        memory=free_memory(device) or 0,
        near=reading / 2,
        far=12.5 * GIGA,
        source=f"measured just now, {where}; its memory is what is free",
        a_layer=_starting(device),
        is_cpu=is_cpu,
        is_measured=True,
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; of the machine within its container's limit. None where
    the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        return min(available * 1024, int(LIMIT.read_text()) - int(USED.read_text()))
    # There is no container, or it has no limit ("max").
    except (OSError, ValueError):
        return available * 1024


def _multiplying(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices, the best of a few rounds."""
    size = _side(device)
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda: a @ a, device)


def _side(device: torch.device) -> int:
    """The rows and columns of a matrix that is large for the device."""
    return MATRIX if device.type == "cpu" else 8 * MATRIX


def _reading(device: torch.device) -> float:
    """Bytes a second of weights that products of a few rows read, more than a cache holds: a
    processor reads them far slower than it sums them."""
    size = _side(device)
    weights = [torch.ones(size, size, device=device) for _ in range(READ_BYTES // (4 * size**2))]
    rows = torch.ones(DRAWN_ROWS, size, device=device)
    return READ_BYTES / _seconds(lambda: [rows @ weight.T for weight in weights], device)


def _starting(device: torch.device) -> float:
    """Seconds of a layer for a token where starting its operations is all that takes time: those of
    a shipped model's layers, of width 64."""
    model = load_model("potstill:base").to(device)
    given = {"end_ids": (), "sampling": Sampling(), "vocab_size": None}

    def write() -> None:
        sample(model.model, [(1,)], [(0, 0, 0)], max_tokens=DRAWN_TOKENS, **given)

    return _seconds(write, device) / DRAWN_TOKENS / model.model.config.num_hidden_layers


def _seconds(work, device: torch.device) -> float:
    """The shortest time of a few rounds, after one that warms up."""
    times = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
