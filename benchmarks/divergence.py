"""Time and memory of the fused divergence, of what people write by hand, and of two peers, side by
side.

Time is a ratio: process CPU time of one forward and backward pass over that of the four matrix
products no exact method can avoid (both models' logits, the gradients of hidden states and head),
with their buffers reused. All methods take turns within one process; each keeps its shortest time
of all rounds. A ratio of 1 cannot be beaten.

Memory is the high-water mark of a process of its own, from when the inputs exist, without the
gradients that come out.

"mixed" is half forward, half reverse KL; everything else is the forward KL. Liger's loss runs
uncompiled and has no mixture; TRL needs two calls for one. "stream" has a budget of 0 bytes,
"budget" the default one.
"""

import concurrent.futures
import ctypes
import datetime
import gc
import json
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from potstill.kl import plan
from potstill.kl.fused import DEFAULT_BUDGET, fused_loss
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms

FORWARD, MIXED = LossTerms(forward=1.0), LossTerms(forward=0.5, reverse=0.5)


class Shape(NamedTuple):
    dtype: str
    N: int
    V: int
    d_student: int
    d_teacher: int

    def __str__(self) -> str:
        return f"{self.dtype} N={self.N} V={self.V} d={self.d_student}/{self.d_teacher}"

    @property
    def stream_floor(self) -> float:
        """Products of a method that computes all logits twice, over the necessary ones."""
        return (4 * self.d_student + 2 * self.d_teacher) / (3 * self.d_student + self.d_teacher)


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor


TIMED = (
    Shape("float32", 256, 151_936, 1024, 2560),
    Shape("float32", 512, 151_936, 256, 512),
    Shape("float32", 1024, 49_152, 256, 512),
    Shape("bfloat16", 256, 49_152, 256, 512),
)
# For memory alone: it must not grow with N. What holds whole logits would need 30 GB at the
# largest.
MEASURED = tuple(Shape("float32", n, 151_936, 256, 512) for n in (1024, 8192))
QUICK = (Shape("float32", 64, 8_192, 32, 64),)


def ours(terms: LossTerms, budget: int, backend: str = "eager") -> Callable[[Inputs], torch.Tensor]:
    def loss(x: Inputs) -> torch.Tensor:
        heads = Head(x.weight), Head(x.teacher_weight)
        return fused_loss(
            x.hidden, heads[0], x.teacher_hidden, heads[1], terms, budget=budget, backend=backend
        )[0]

    return loss


def naive(x: Inputs) -> torch.Tensor:
    return _naive_parts(x)[0]


def naive_mixed(x: Inputs) -> torch.Tensor:
    _, student, teacher = (forward := _naive_parts(x))
    return 0.5 * forward[0] + 0.5 * F.kl_div(teacher, student, reduction="sum", log_target=True)


def _naive_parts(x: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student = F.log_softmax((x.hidden @ x.weight.T).float(), -1)
    with torch.no_grad():
        teacher = F.log_softmax((x.teacher_hidden @ x.teacher_weight.T).float(), -1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True), student, teacher


def liger(x: Inputs, compiled: bool = False) -> torch.Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled
    )
    labels = torch.zeros(len(x.hidden), dtype=torch.long, device=x.hidden.device)
    return loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, labels) * len(x.hidden)


def trl(x: Inputs, beta: float = 0.0) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    values = ChunkedDivergenceFunction.apply(
        x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None, beta, 1.0
    )
    return values[0].sum()  # pyright: ignore[reportOptionalSubscript]


def trl_mixed(x: Inputs) -> torch.Tensor:
    return 0.5 * trl(x) + 0.5 * trl(x, beta=1.0)


METHODS: dict[str, Callable[[Inputs], torch.Tensor]] = {
    "ours-stream": ours(FORWARD, 0),
    "ours-stream-compiled": ours(FORWARD, 0, "compiled"),
    "ours-stream-mixed": ours(MIXED, 0),
    "ours-budget": ours(FORWARD, DEFAULT_BUDGET),
    "ours-budget-compiled": ours(FORWARD, DEFAULT_BUDGET, "compiled"),
    "ours-budget-mixed": ours(MIXED, DEFAULT_BUDGET),
    "ours-half-budget": ours(FORWARD, DEFAULT_BUDGET // 2),
    "ours-double-budget": ours(FORWARD, 2 * DEFAULT_BUDGET),
    "naive": naive,
    "naive-mixed": naive_mixed,
    "liger": liger,
    "trl": trl,
    "trl-mixed": trl_mixed,
}


def make_inputs(shape: Shape) -> Inputs:
    torch.manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def weight(dim: int) -> torch.Tensor:
        return torch.randn(shape.V, dim).mul_(2 / dim**0.5).to(dtype)

    hidden, teacher_hidden = (
        torch.randn(shape.N, d).to(dtype) for d in (shape.d_student, shape.d_teacher)
    )
    student_weight, teacher_weight = weight(shape.d_student), weight(shape.d_teacher)
    return Inputs(
        hidden.requires_grad_(), student_weight.requires_grad_(), teacher_hidden, teacher_weight
    )


def step(loss: Callable[[Inputs], torch.Tensor], x: Inputs) -> None:
    x.hidden.grad = x.weight.grad = None
    loss(x).backward()


def gemm_bound(x: Inputs, num_parts: int = 8) -> Callable[[], None]:
    """The necessary matrix products alone, by parts of the vocabulary, into buffers that are there
    already."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    size = len(weight) // num_parts
    student, teacher = (torch.empty(len(hidden), size, dtype=hidden.dtype) for _ in range(2))

    def run() -> None:
        for start in range(0, num_parts * size, size):
            part = slice(start, start + size)
            torch.mm(hidden, weight[part].T, out=student)
            torch.mm(x.teacher_hidden, x.teacher_weight[part].T, out=teacher)
            grad_hidden.addmm_(student, weight[part])
            torch.mm(student.T, hidden, out=grad_weight[part])

    return run


def time_ratios(shape: Shape, names: list[str], rounds: int) -> dict[str, float]:
    """Shortest CPU time of each method over that of the bound, all in turns."""
    x = make_inputs(shape)
    runs: dict[str, Callable[[], None]] = {"gemm-bound": gemm_bound(x)}
    runs |= {name: lambda loss=METHODS[name]: step(loss, x) for name in names}
    best = dict.fromkeys(runs, float("inf"))
    for name, loss in METHODS.items():
        # Imports, and compilation for exactly this shape.
        step(loss, x if "compiled" in name else make_inputs(QUICK[0]))
    for _ in track(range(rounds), description=f"time {shape}", transient=True):
        for name, run in runs.items():
            x.hidden.grad = x.weight.grad = None
            gc.collect()
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return {name: seconds / best["gemm-bound"] for name, seconds in best.items()}


def extra_megabytes(name: str, shape: Shape) -> float:
    """Runs in a process of its own: what one pass needs beyond its inputs and the gradients it
    returns."""
    torch.set_num_threads(1)
    # Code and compiled functions come to memory here.
    step(METHODS[name], make_inputs(shape._replace(N=min(shape.N, 300), V=7_000)))
    x = make_inputs(shape)
    # Memory that was freed, or that a thread keeps for its next call, would hide as much of what
    # comes now.
    plan.ARENA.flat = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_mark()
    step(METHODS[name], x)
    gradients = sum(t.numel() * t.element_size() for t in (x.hidden, x.weight)) / 1e6
    return _high_water_mark() - before - gradients


def _high_water_mark() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")) / 1e6


def measure_memory(names: list[str], shape: Shape) -> Iterator[tuple[str, float]]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for name in track(names, description=f"memory {shape}", transient=True):
            yield name, pool.submit(extra_megabytes, name, shape).result()


def main(
    threads: int = 1,
    rounds: int = 3,
    methods: tuple[str, ...] = tuple(METHODS),
    only: str = "",
    quick: bool = False,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    chart: Path | None = None,
) -> None:
    """Measure, print tables, and write the rows to a JSON file and a picture.

    Args:
        threads: Threads of the timed process.
        rounds: Turns of each method.
        methods: Which to measure.
        only: Measure the shapes whose name, such as "bfloat16 N=256 V=49152 d=256/512", contains
        this.
        quick: One tiny shape, to try the command out. Its figures mean nothing.
        json_file: Where to write one row per method and shape.
        chart: Where to draw time against memory, as SVG or PNG.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise SystemExit(f"method {unknown[0]!r} is unknown; choose from {', '.join(METHODS)}")
    torch.set_num_threads(threads)
    names, rows = list(methods), []
    timed, measured = (QUICK, ()) if quick else (TIMED, MEASURED)
    for shape in (shape for shape in (*timed, *measured) if only in str(shape)):
        # Whole logits of the largest shape fit no laptop; other budgets are there for their time.
        fits = [name for name in names if shape.N < 8192 or name.startswith("ours")]
        fits = [name for name in fits if name not in ("ours-half-budget", "ours-double-budget")]
        ratios = time_ratios(shape, names, rounds) if shape in timed else {}
        megabytes = dict(measure_memory(fits, shape))
        for name in ratios or fits:
            ratio, extra = ratios.get(name), megabytes.get(name)
            rows.append(
                {"method": name, **shape._asdict()}
                | {
                    "time_ratio": ratio and round(ratio, 3),
                    "extra_mb": extra if extra is None else round(extra, 1),
                }
            )
        _print_table(shape, rows[-len(ratios or fits) :])
        if json_file is not None:
            json_file.write_text(json.dumps(rows, indent=1) + "\n")
    machine = f"{platform.machine()}, {threads} thread(s), Python {platform.python_version()}"
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("torch", "trl", "liger-kernel")
    )
    Console().print(f"{datetime.date.today()}  {machine}, {versions}")
    if chart is not None:
        draw(rows, chart)


def _print_table(shape: Shape, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{shape}, products of streaming {shape.stream_floor:.2f}")
    for column in ("method", "time / bound", "extra MB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        cells = (row["time_ratio"], row["extra_mb"])
        table.add_row(row["method"], *("-" if cell is None else f"{cell:,.2f}" for cell in cells))
    Console().print(table)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Time against memory on a logarithmic axis, one panel a timed shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {
        "ours-stream": "#0b6e4f",
        "ours-budget": "#5fb49c",
        "naive": "#6c757d",
        "liger": "#d08c00",
        "trl": "#b0413e",
    }
    shapes = list(
        dict.fromkeys(
            tuple(row[k] for k in Shape._fields) for row in rows if row["time_ratio"] is not None
        )
    )
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(3.6 * len(shapes), 3.8), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        axis.set_title(str(Shape(*shape)), fontsize=8)
        for row in rows:
            method, family = row["method"], row["method"].removesuffix("-mixed")
            if (
                tuple(row[k] for k in Shape._fields) != shape
                or row["extra_mb"] is None
                or family not in colours
            ):
                continue
            fill = "none" if method != family else colours[family]
            axis.scatter(
                row["extra_mb"],
                row["time_ratio"],
                s=46,
                edgecolors=colours[family],
                facecolors=fill,
                label=method,
            )
        axis.axhline(1, color="0.7", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="extra memory, MB")
        ticks = [1, 1.5, 2, 3, 5, 10, 20, 30]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axes[0][0].set_ylabel("CPU time / necessary products")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="lower center",
        ncols=9,
        fontsize=7,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(file)


if __name__ == "__main__":
    tyro.cli(main)
