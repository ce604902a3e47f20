"""A study: what is missing of a plan is done, each run once, side by side.

`file.read_study_file` -> `planning.plan` -> `jobs.run_jobs`. `plan.json` in the study's
folder says what it consists of and how far it is; the report reads it.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from potstill.config import METHODS, RecipeError, to_toml
from potstill.console.printable import plain, say
from potstill.files import write_atomically, write_json
from potstill.runs.results import PLAN_FILE, read_entry, read_plan
from potstill.runs.results_schema import PlanPanel, StudyPlan
from potstill.runs.run_folder import edited_files, locked
from potstill.study.cluster import Cluster, on_cluster
from potstill.study.file import Study
from potstill.study.items import Item, recipe_file
from potstill.study.jobs import Execute, Job, as_processes, run_jobs
from potstill.study.planning import PlannedPanel, choose, plan
from potstill.tasks import make_task
from potstill.tasks.own import check_file, own_files, own_task

# Jobs of a study that a cluster is given at once.
JOBS_AT_ONCE = 1000


def run_study(
    study: Study,
    execute: Execute,
    num_jobs: int | None = None,
    dry_run: bool = False,
    cluster: Cluster | None = None,
) -> bool:
    """Do what is missing of a study, sweeps first, each run by `execute` in a process of its own,
    or by a `cluster`; returns whether nothing crashed.

    Prints the plan with estimated time and disk before it begins, and asks nothing. What crashed in
    an earlier call is done again. Raises RecipeError or RunError before any work when a run could
    not begin.
    """
    if num_jobs is not None and num_jobs < 1:
        raise RecipeError(f"--jobs is {num_jobs}; it must be at least 1")
    if study.out.exists() and not study.out.is_dir():
        raise RecipeError(f"the study's folder {str(study.out)!r} is a file; choose another out")
    if cluster is None:
        num_parallel, one_thread = _processes(num_jobs)
    else:
        num_parallel, one_thread = num_jobs or JOBS_AT_ONCE, False
    states = _last_states(study)
    chosen_before = choose(study)
    panels = plan(study, chosen_before)
    _check_models(study, panels)
    sources = _own_sources(panels)
    for source in sources:
        check_file(source)
    print_plan(study, panels, states, num_parallel, one_thread, list_all=dry_run)
    say(*_outdated(panels))
    if dry_run:
        return True
    for source in sources:
        make_task(source)
    study.out.mkdir(parents=True, exist_ok=True)
    if cluster is None:
        start = as_processes(execute, one_thread)
    else:
        start = on_cluster(study.out / "cluster", cluster)
    run = partial(run_jobs, start=start, num_parallel=num_parallel)
    with locked(study.out, "study"):
        crashed = _run_stage(study, [panel for panel in panels if panel.is_sweep], panels, run)
        chosen = choose(study)
        if chosen != chosen_before:
            panels = plan(study, chosen)
        for (title, method), value in chosen.items():
            say(f"{title}: {METHODS[method].name} goes on with {value:g}")
        others = [panel for panel in panels if not panel.is_sweep]
        crashed += _run_stage(study, others, panels, run)
    for item, message in crashed:
        say(f"CRASHED {item.job.name}: {message} ({item.job.log})", error=True)
    return not crashed


def _check_models(study: Study, panels: Sequence[PlannedPanel]) -> None:
    """Raise ModelError for a model that can be nowhere, but for those that the study itself
    makes."""
    from potstill.models.language_model import locate

    names: set[str] = set()
    for item in (item for panel in panels for item in panel.items):
        names |= {item.recipe.student.model, item.recipe.teacher.model} - {"self"}
        if item.kind == "evaluate":
            names.add(item.job.arguments[1])
    for name in sorted(names):
        if not Path(name).is_relative_to(study.out):
            locate(name)


def _own_sources(panels: Sequence[PlannedPanel]) -> list[str]:
    """The tasks of the user's own that the runs of a study take problems from."""
    items = [item for panel in panels for item in panel.items]
    sources = [
        source for item in items for source in (item.recipe.data.origin, item.evaluation.source)
    ]
    return sorted({source for source in sources if isinstance(source, str) and own_task(source)})


def _outdated(panels: Sequence[PlannedPanel]) -> list[str]:
    """A line for each file of the user's own that has changed since some of the study's runs were
    done with it."""
    done = {
        item.job.path: item
        for panel in panels
        for item in panel.items
        if item.is_done and item.kind != "cache"
    }
    edited = Counter(file for item in done.values() for file in _edited_files(item))
    return [
        f"{file} has changed since {num} finished runs and evaluations began; they stay as they "
        "are: remove those that are to be done again"
        for file, num in sorted(edited.items())
    ]


def _edited_files(item: Item) -> list[str]:
    """The files of the user's own that a finished item has run, and that are now other than
    then."""
    if item.kind != "evaluate":
        return list(
            edited_files(
                item.job.path, own_files(item.recipe.data.origin, *item.recipe.own_sources)
            )
        )
    then = read_entry(item.job.path).evals[0]["settings"].get("source_sha256")
    return [file for file, now in own_files(item.evaluation.source).items() if now != then]


def _processes(num_jobs: int | None) -> tuple[int, bool]:
    """How many processes, and whether each is to compute with one thread: where they share the
    cores of a CPU."""
    import torch

    has_gpu = torch.cuda.is_available()
    num_parallel = num_jobs or (1 if has_gpu else os.cpu_count() or 1)
    return num_parallel, num_parallel > 1 and not has_gpu


def _run_stage(
    study: Study,
    stage: Sequence[PlannedPanel],
    panels: Sequence[PlannedPanel],
    run: Callable[..., None],
) -> list[tuple[Item, str]]:
    """Run what is missing of some panels. Returns what crashed."""
    # The same run can be in several panels.
    items = {
        item.job.path: item
        for panel in stage
        for item in panel.items
        if not (item.is_done or item.pending)
    }
    states = _last_states(study)
    for item in items.values():
        if item.kind != "evaluate":
            file = recipe_file(study, item.job.path)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, to_toml(item.recipe.resolved()))
        states.pop(str(item.job.path.relative_to(study.out)), None)
    _write_plan(study, panels, states)
    crashed = []

    def on_end(job: Job, message: str | None) -> None:
        if message is not None:
            crashed.append((items[job.path], message))
            states[str(job.path.relative_to(study.out))] = f"crashed: {message}"
            _write_plan(study, panels, states)

    # Jobs that others wait for come first, then the longest, so that the processes end together.
    needed = {path for item in items.values() for path in item.job.needs}
    order = sorted(
        items.values(), key=lambda item: (item.job.path not in needed, -item.job.num_steps)
    )
    run([item.job for item in order], on_end=on_end)
    return crashed


def _last_states(study: Study) -> dict[str, str]:
    """The last known states of runs that crashed."""
    if not (study.out / PLAN_FILE).exists():
        return {}
    runs = [run for panel in read_plan(study.out) for run in panel["runs"]]
    return {run["folder"]: run["state"] for run in runs if run["state"].startswith("crashed")}


def state_of(item: Item, study: Study, states: dict[str, str]) -> str:
    """done, crashed (with its last line), unfinished, not begun, or waits for the sweep."""
    if item.pending:
        return "waits for the sweep"
    if item.is_done:
        return "done"
    crashed = states.get(str(item.job.path.relative_to(study.out)))
    return crashed or ("unfinished" if item.job.path.exists() else "not begun")


def _write_plan(study: Study, panels: Sequence[PlannedPanel], states: dict[str, str]) -> None:
    """Write what the report reads: panels with their runs and what is known of those that are not
    done."""
    planned: list[PlanPanel] = [
        {
            "title": panel.title,
            "note": panel.note,
            "is_sweep": panel.is_sweep,
            "runs": [
                {
                    "folder": str(item.job.path.relative_to(study.out)),
                    "name": item.label,
                    "state": state_of(item, study, states),
                }
                for item in panel.items
                if item.shown and not item.pending
            ],
        }
        for panel in panels
    ]
    found: StudyPlan = {"panels": planned}
    write_json(study.out / PLAN_FILE, found)


def print_plan(
    study: Study,
    panels: Sequence[PlannedPanel],
    states: dict[str, str],
    num_parallel: int,
    one_thread: bool,
    list_all: bool,
) -> None:
    """Print what there is to do, panel by panel (`list_all`: run by run), and about how long and
    how large it is."""
    from rich.console import Console
    from rich.table import Table

    from potstill.study.estimates import estimate_costs

    items = list({item.job.path: item for panel in panels for item in panel.items}.values())
    costs = estimate_costs(items, one_thread)
    table = Table(title=plain(study.out, "italic"), title_justify="left")
    for column in ("panel", "train", "evaluate", "cache", "done", "crashed", "to do"):
        table.add_column(
            column, justify="left" if column == "panel" else "right", min_width=len(column)
        )
    for panel in panels:
        found = [state_of(item, study, states) for item in panel.items]
        num_done, num_crashed = (
            found.count("done"),
            sum(state.startswith("crashed") for state in found),
        )
        kinds = [
            str(sum(i.kind == kind for i in panel.items)) for kind in ("train", "evaluate", "cache")
        ]
        table.add_row(
            plain(panel.title), *kinds, str(num_done), str(num_crashed), str(len(found) - num_done)
        )
    console = Console(soft_wrap=True)
    console.print(table)
    for item in (
        items
        if list_all
        else [item for item in items if state_of(item, study, states).startswith("crashed")]
    ):
        place = "" if item.pending else f" ({item.job.path})"
        console.print(plain(f"{item.job.name}: {state_of(item, study, states)}{place}"))
    known = [cost for cost in costs.values() if cost is not None]
    if not costs:
        say("nothing is left to do")
        return
    num_parallel = min(num_parallel, len(costs))
    minutes = sum(cost.seconds for cost in known) / num_parallel / 60
    megabytes = sum(cost.num_bytes for cost in known) / 1e6
    say(
        f"{len(costs)} to do, {num_parallel} at a time: about {minutes:.0f} minutes and "
        f"{megabytes:.0f} MB for {len(known)} of them (from finished runs and trials)"
    )
    if len(known) < len(costs):
        say(
            f"what the other {len(costs) - len(known)} take is known when the first of their "
            "kind is done"
        )
