"""The price of weights that come from a function of each token's statistics, and of a reward beside
a KL.

Each case is one forward and backward pass of `fused_loss` in two variants, on the same inputs, in
turns within one process; which goes first changes from turn to turn. The ratio of a turn is the
process CPU time with over that without. The table has the median of all turns, both quartiles, and
the ratio of the shortest times, which other work on the machine disturbs least.

"same" gives the very terms of the variant without by a function. "by entropy" weighs each token by
its entropies, so that numbers become tensors; "frozen" are the same tensors given at once. "todi"
is the weighting of that name with all that training knows of a token, labels included. "reward"
is the reverse KL beside a cross-entropy of weights of both signs, which needs the labels.
"""

import datetime
import gc
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from divergence import QUICK, Inputs, Shape, make_inputs
from rich.console import Console
from rich.progress import track
from rich.table import Table

from potstill.kl.fused import fused_loss, fused_statistics
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms, TermsFunction, TokenStats
from potstill.objectives.tokens import KnownBefore
from potstill.objectives.weightings import todi

# Large vocabularies, and a batch of the models that ship, whose arithmetic hides nothing.
SHAPES = (
    Shape("float32", 256, 49_152, 256, 512),
    Shape("float32", 128, 151_936, 256, 512),
    Shape("float32", 2048, 23, 64, 96),
)
KLS = {
    "forward": LossTerms(forward=1.0),
    "reverse": LossTerms(reverse=1.0),
    "mixed": LossTerms(forward=0.3, reverse=0.7),
}
# A turn of a small shape repeats its step for at least so long.
SECONDS_A_TURN = 0.5


class Case(NamedTuple):
    """Two variants of a step: without and with."""

    name: str
    without: LossTerms | TermsFunction
    by: LossTerms | TermsFunction
    labels_N: torch.Tensor | None = None


def by_entropy(terms: LossTerms) -> TermsFunction:
    """Terms weighed by what share of both entropies is the teacher's."""

    def function(stats: TokenStats, rows: slice) -> LossTerms:
        assert stats.teacher_entropy_N is not None
        whole_N = stats.teacher_entropy_N + stats.student_entropy_N
        return terms.scaled(stats.teacher_entropy_N / whole_N)

    return function


def by_todi(terms: LossTerms, num_tokens: int) -> TermsFunction:
    """The weighting "todi" of the tokens of one rollout."""
    places_N = torch.arange(num_tokens)
    known = KnownBefore(
        position_N=places_N,
        rollout_N=torch.zeros_like(places_N),
        is_student_N=places_N >= 0,
        is_last_N=places_N == num_tokens - 1,
        sampling_log_prob_N=None,
        score_N=None,
        group_score_N=None,
        advantage_N=None,
    )

    def function(stats: TokenStats, rows: slice) -> LossTerms:
        return todi(known.at(rows).tokens(terms, stats))

    return function


def cases(x: Inputs) -> list[Case]:
    with torch.no_grad():
        stats = fused_statistics(x.hidden, Head(x.weight), x.teacher_hidden, Head(x.teacher_weight))
    rows = slice(0, len(x.hidden))
    found = []
    for kl, terms in KLS.items():
        weighed = by_entropy(terms)
        found += [
            Case(f"{kl}: same over fixed", terms, lambda stats, rows, terms=terms: terms),
            Case(f"{kl}: by entropy over frozen", weighed(stats, rows), weighed),
            Case(f"{kl}: by entropy over fixed", terms, weighed),
        ]
    generator = torch.Generator().manual_seed(0)
    advantages_N = torch.randn(len(x.hidden), generator=generator)
    labels_N = torch.randint(len(x.weight), (len(x.hidden),), generator=generator)
    reward = LossTerms(reverse=1.0, cross_entropy=advantages_N)
    found.append(Case("reverse: with reward over alone", KLS["reverse"], reward, labels_N))
    weighed = by_todi(KLS["mixed"], len(x.hidden))
    found.append(Case("mixed: todi over fixed", KLS["mixed"], weighed, labels_N))
    return found


def seconds(x: Inputs, terms: LossTerms | TermsFunction, labels_N, repeats: int) -> float:
    heads = Head(x.weight), Head(x.teacher_weight)
    gc.collect()
    start = time.process_time()
    for _ in range(repeats):
        x.hidden.grad = x.weight.grad = None
        given = (x.hidden, heads[0], x.teacher_hidden, heads[1])
        fused_loss(*given, terms, labels_N=labels_N)[0].backward()
    return time.process_time() - start


def measure(shape: Shape, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each turn of each case, without and with."""
    x = make_inputs(shape)
    all_cases = cases(x)
    once = max(seconds(x, case.by, case.labels_N, repeats=1) for case in all_cases)
    repeats = max(round(SECONDS_A_TURN / once), 1)
    found: dict[str, list[tuple[float, float]]] = {case.name: [] for case in all_cases}
    for turn in track(range(rounds), description=str(shape), transient=True):
        for case in all_cases:
            variants = [(case.without, None), (case.by, case.labels_N)]
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            took = {i: seconds(x, variants[i][0], variants[i][1], repeats) for i in order}
            found[case.name].append((took[0], took[1]))
    return found


def main(
    threads: int = 1,
    rounds: int = 15,
    only: str = "",
    quick: bool = False,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measure, print a table for each shape, and write the rows to a JSON file.

    Args:
        threads: Threads of the process.
        rounds: Turns of each case.
        only: Measure the shapes whose name, such as "float32 N=256 V=49152 d=256/512", contains
        this.
        quick: One tiny shape, to try the command out. Its figures mean nothing.
        json_file: Where to write one row per case and shape.
    """
    torch.set_num_threads(threads)
    rows = []
    for shape in (shape for shape in (QUICK if quick else SHAPES) if only in str(shape)):
        table = Table("case", "median", "quartiles", "shortest", title=str(shape))
        for name, took in measure(shape, rounds).items():
            low, middle, high = statistics.quantiles([after / before for before, after in took])
            before, after = (min(each) for each in zip(*took, strict=True))
            cells = (f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{after / before:.3f}")
            table.add_row(name, *cells)
            row = {"case": name, "median": middle, "quartiles": [low, high], "rounds": rounds}
            rows.append(row | {"shortest": after / before} | shape._asdict())
        Console().print(table)
        if json_file is not None:
            json_file.write_text(json.dumps(rows, indent=1) + "\n")
    machine = f"{platform.machine()}, {threads} thread(s), Python {platform.python_version()}"
    Console().print(f"{datetime.date.today()}  {machine}, torch {version('torch')}")


if __name__ == "__main__":
    tyro.cli(main)
