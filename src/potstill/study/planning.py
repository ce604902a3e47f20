"""From a study's file to everything that it makes, panel by panel, and what its sweeps chose."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.config import RecipeError, make_recipe, run_evaluation, with_fields
from potstill.runs.results import read_entry
from potstill.study.cells import axis_text, cells, corner, widest_window
from potstill.study.file import PanelPlan, Study
from potstill.study.items import Item, evaluation_item, panel_recipe, run_items, stage_item

# The most runs of a panel: more are a slip in an axis, and would take minutes to plan alone.
MAX_RUNS = 10_000
# A sweep is judged on problems that no other run is evaluated on.
SWEEP_EVALUATION_SEED = 1_000_003


@dataclass(frozen=True, kw_only=True)
class PlannedPanel:
    """The runs and models that one panel of the report will be made of."""

    title: str
    note: str
    items: tuple[Item, ...]
    is_sweep: bool = False


def plan(study: Study, chosen: dict[tuple[str, str], float]) -> list[PlannedPanel]:
    """Everything that the study makes, panel by panel, sweeps last; `chosen` are the sweeps'
    results so far.

    Raises RecipeError for any run that could not begin.
    """
    _refuse_more_than_can_be_run(study)
    panels: list[PlannedPanel] = []

    def add(title: str, note: str, items: Iterator[Item], is_sweep: bool = False) -> None:
        # Several runs can need one cache.
        once = tuple({item.job.path: item for item in items}.values())
        panels.append(PlannedPanel(title=title, note=note, items=once, is_sweep=is_sweep))

    for panel in study.panels:
        add(panel.title, panel.note, _panel_items(study, panel, chosen))
    for panel in study.panels:
        if panel.sweep is not None:
            note = (
                f"{panel.sweep.field} is chosen for each method by Avg on problems of its "
                "own, at one seed."
            )
            add(f"{panel.title}: sweep", note, _sweep_items(study, panel), is_sweep=True)
    return panels


def _refuse_more_than_can_be_run(study: Study) -> None:
    for panel in study.panels:
        sizes = [
            math.prod(map(len, group.axes.values())) * len(group.seeds or study.seeds)
            for group in panel.groups
        ]
        if sum(sizes) > MAX_RUNS:
            raise RecipeError(
                f"panel {panel.title!r} has {sum(sizes):,} runs, more than {MAX_RUNS:,}; give "
                "its axes fewer values"
            )


def _sweep_items(study: Study, panel: PanelPlan) -> Iterator[Item]:
    sweep = panel.sweep
    assert sweep is not None
    window = widest_window(cells(study, panel)) if sweep.cache else None
    for method, value in itertools.product(sweep.methods, sweep.values):
        fields = study.fields | panel.fields | sweep.fields | corner(method) | {sweep.field: value}
        fields |= {"evaluation.seed": SWEEP_EVALUATION_SEED}
        yield from run_items(
            study,
            panel,
            fields,
            study.seeds[0],
            [axis_text(sweep.field, f"{value:g}")],
            "",
            window,
        )


def choose(study: Study) -> dict[tuple[str, str], float]:
    """The value of each finished sweep, by panel and method: the best Avg at the highest
    temperature."""
    chosen = {}
    for panel in study.panels:
        if panel.sweep is None:
            continue
        runs = [item for item in _sweep_items(study, panel) if item.kind == "train"]
        for i, method in enumerate(panel.sweep.methods):
            tried = runs[i * len(panel.sweep.values) : (i + 1) * len(panel.sweep.values)]
            if all(item.is_done for item in tried):
                scores = [
                    max(read_entry(item.job.path).evals, key=lambda row: row["temperature"])["avg"]
                    for item in tried
                ]
                best = max(range(len(tried)), key=lambda k: scores[k][0])
                chosen[panel.title, method] = panel.sweep.values[best]
    return chosen


def _panel_items(
    study: Study, panel: PanelPlan, chosen: dict[tuple[str, str], float]
) -> Iterator[Item]:
    base = panel_recipe(panel, study.fields | panel.fields, study.seeds[0], study.out / "runs/base")
    for model in panel.models:
        yield evaluation_item(
            study, model.removeprefix("potstill:"), model, base, run_evaluation(base)
        )
    for group in panel.groups:
        seeds = group.seeds or study.seeds
        for stage, seed in itertools.product(group.then, seeds):
            for model in stage.also_from:
                yield stage_item(
                    study,
                    stage,
                    model=model,
                    start=base,
                    seed=seed,
                    origin=model,
                    which=_seed_text(seed, seeds),
                )
    all_cells = cells(study, panel)
    widest = widest_window(all_cells)
    for cell in all_cells:
        window = widest if cell.group.cache else None
        fields, pending = cell.fields, False
        if panel.sweep is not None and cell.method in panel.sweep.methods:
            value = chosen.get((panel.title, cell.method))
            pending = value is None
            fields = fields | {panel.sweep.field: panel.sweep.values[0] if value is None else value}
        for seed in cell.seeds:
            which = _seed_text(seed, cell.seeds)
            made = list(run_items(study, panel, fields, seed, cell.details, which, window, pending))
            yield from made
            run = made[-1]
            for stage in cell.group.then:
                yield stage_item(
                    study,
                    stage,
                    model=str(run.job.path),
                    start=run.recipe,
                    seed=seed,
                    origin=run.label,
                    which=which,
                    pending=pending,
                    needs=(run.job.path,),
                )
            for judgement in cell.group.judgements:
                judged = with_fields(run.recipe.resolved(), _in("evaluation", judgement.fields))
                settings = run_evaluation(make_recipe(judged))
                model, name = str(run.job.path / "model"), f"{run.job.name}, {judgement.label}"
                yield evaluation_item(
                    study, name, model, run.recipe, settings, pending, (run.job.path,)
                )


def _in(section: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in fields.items()}


def _seed_text(seed: int, seeds: Sequence[int]) -> str:
    return f", seed {seed}" if len(seeds) > 1 else ""
