"""Comparisons of a report: seeds of one recipe as one group, its metrics with intervals, grids,
sweeps and pairs.

Works on what `results` read, and needs no torch.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from potstill.config import ALIKE, Role, dotted, fields_with, role_of
from potstill.report.metrics import Metric, Summary, over_seeds, problem_values, summarize_entries
from potstill.runs.results import Entry, find_starts, group_by_seed, recipe_key
from potstill.statistics import Estimate

# In which fields the runs of a grid differ, of a sweep of the forward weight, and of a comparison
# of windows.
GRID_AXES = (Role.PREFIX, Role.DIVERGENCE)
SWEEP_AXES = (Role.DIVERGENCE, Role.WEIGHT_SCHEDULE)
WINDOW_AXES = (Role.WINDOW,)
BUDGET = (Role.LENGTH, Role.WARM_UP, Role.BUDGET)


@dataclass(frozen=True)
class Group:
    """Runs that differ in seeds alone, or one model; `summaries` by key of the metric."""

    label: str
    entries: tuple[Entry, ...]
    summaries: dict[str, Summary]


@dataclass(frozen=True)
class GridPart:
    """Groups that differ in the fields under comparison alone, and what tells them from other
    parts."""

    label: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class BeforeAndAfter:
    """A group of runs with a reward beside what they started from; differences (after - before) by
    key of the metric."""

    before: Group
    after: Group
    differences: dict[str, Estimate | None]


def paired_difference(pairs: Iterable[tuple[Entry, Entry]], metric: Metric) -> Estimate | None:
    """The mean over pairs of seeds of second - first on the same problems; None where the problems
    differ."""
    rows: list[dict[str, float] | None] = []
    for first, second in pairs:
        a, b = problem_values(first, metric), problem_values(second, metric)
        rows.append(
            {key: b[key] - a[key] for key in a} if a and b and a.keys() == b.keys() else None
        )
    return over_seeds(rows)


def pair_up(first: Group, second: Group) -> list[tuple[Entry, Entry]]:
    """The runs of two groups with the same seeds."""
    by_seeds = {json.dumps(seeds_in(entry)): entry for entry in first.entries}
    return [
        (by_seeds[seeds], entry)
        for entry in second.entries
        if (seeds := json.dumps(seeds_in(entry))) in by_seeds
    ]


def seeds_in(entry: Entry) -> dict[str, int]:
    """The run's seeds by field; none of a model."""
    fields = flat(entry)
    return {name: fields[name] for name in fields_with(Role.SEED) if name in fields}


def seed_names(group: Group) -> dict[Path, str]:
    """Names for a group's runs: the seeds that vary, that of training where none does; "" of a
    model."""
    seeds = [seeds_in(entry) for entry in group.entries]
    names = fields_with(Role.SEED)
    varying = [name for name in names if len({each.get(name) for each in seeds}) > 1]
    shown = varying or [name for name in names if name != "data.seed"]
    # Seeds of one number, as a study sets them, are said once.
    texts = [
        "/".join(dict.fromkeys(str(each[name]) for name in shown if name in each)) for each in seeds
    ]
    return {
        entry.path: text and f"seed {text}"
        for entry, text in zip(group.entries, texts, strict=True)
    }


def in_turn(groups: Sequence[Group]) -> list[Entry]:
    """The first entry of each group, then the second of each, and so on."""
    depth = max((len(group.entries) for group in groups), default=0)
    return [group.entries[i] for i in range(depth) for group in groups if i < len(group.entries)]


def make_groups(entries: Sequence[Entry], metrics: Sequence[Metric]) -> list[Group]:
    """The entries grouped by seed, each group with a label that no other has."""
    starts = find_starts(entries)
    labels: dict[Path, str] = {}
    found = group_by_seed(entries)
    # Those first that go on from no run: the others are told apart by what they started from.
    for goes_on in (False, True):
        groups = [group for group in found if _goes_on(group[0], starts) == goes_on]
        by_name: dict[str, list[tuple[Entry, ...]]] = defaultdict(list)
        for group in groups:
            by_name[group[0].name].append(group)
        for name, same in by_name.items():
            settings = [_settings(entry, starts.get(entry.path), labels) for entry, *_ in same]
            for group, text in zip(same, tell_apart(settings), strict=True):
                label = f"{name} · {text}" if text else name
                labels |= {entry.path: label for entry in group}
    summaries = [
        {metric.key: summarize_entries(group, metric) for metric in metrics} for group in found
    ]
    return [
        Group(
            labels[group[0].path],
            group,
            {key: summary for key, summary in each.items() if summary is not None},
        )
        for group, each in zip(found, summaries, strict=True)
    ]


def _goes_on(entry: Entry, starts: Mapping[Path, Entry]) -> bool:
    """Whether a run goes on from another one that is known."""
    return entry.path in starts and starts[entry.path].recipe is not None


def _settings(entry: Entry, start: Entry | None, labels: Mapping[Path, str]) -> dict[str, Any]:
    """The fields that tell a run from others of its name: all but seeds, and where it started."""
    fields = {key: value for key, value in flat(entry).items() if role_of(key) is not Role.SEED}
    if start is not None and start.recipe is not None:
        fields["student.model"] = labels.get(start.path, start.name)
    named = {"from" if key == "student.model" else key: value for key, value in fields.items()}
    return named or {"file": str(entry.path)}


def flat(entry: Entry) -> dict[str, Any]:
    """The resolved recipe by dotted field, without `out`. Where operations end a run, so they do as
    its steps."""
    data = json.loads(recipe_key(entry, ()))
    if "flops" in data.get("train", {}):
        data["train"]["steps"] = f"up to {data['train']['flops']:g} operations"
    return dotted(data)


def tell_apart(settings: Sequence[dict[str, Any]]) -> list[str]:
    """For each of these settings a text of the fewest fields that tell them apart, those that all
    have first."""
    names = list(dict.fromkeys(name for fields in settings for name in fields))
    shared = [name for name in names if all(name in fields for fields in settings)]
    chosen: list[str] = []
    num_kinds = 1
    for name in dict.fromkeys((*shared, *names)):
        num_with = len(
            {json.dumps([fields.get(each) for each in (*chosen, name)]) for fields in settings}
        )
        if num_with > num_kinds:
            chosen, num_kinds = [*chosen, name], num_with
    texts = [
        ", ".join(_text(name, fields[name]) for name in chosen if name in fields)
        for fields in settings
    ]
    return [text or ", ".join(f"no {name}" for name in chosen) for text in texts]


def _text(name: str, value: Any) -> str:
    if name in ("teacher.model", "student.model"):
        value = value.rstrip("/").rpartition("/")[2]
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def partition(
    groups: Iterable[Group], axes: Sequence[Role], keep: Callable[[Sequence[Group]], bool] = bool
) -> list[GridPart]:
    """Sets of runs that agree on all but the fields along these axes and seeds, as far as
    they are kept.

    They may also differ in what leaves the objective ALIKE: each can have its best learning rate,
    and some can read a cached teacher. Where that would put two groups in one place, they may not.
    """
    found = [group for group in groups if group.entries[0].recipe is not None]
    for ignored in ((*axes, *ALIKE), tuple(axes)):
        parts: dict[str, list[Group]] = defaultdict(list)
        for group in found:
            parts[recipe_key(group.entries[0], (Role.SEED, *ignored))].append(group)
        places = [
            [json.dumps(split_fields(group, axes)[0]) for group in part] for part in parts.values()
        ]
        if all(len(set(each)) == len(each) for each in places):
            break
    kept = [part for part in parts.values() if keep(part)]
    settings = [split_fields(part[0], (Role.SEED, *ignored))[1] for part in kept]
    return [
        GridPart(label, tuple(part)) for label, part in zip(tell_apart(settings), kept, strict=True)
    ]


def split_fields(group: Group, axes: Sequence[Role]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group's fields along these axes, and the others."""
    fields = flat(group.entries[0])
    along = {name for name in fields if role_of(name) in axes}
    return {name: fields[name] for name in fields if name in along}, {
        n: v for n, v in fields.items() if n not in along
    }


def grids(groups: Sequence[Group]) -> list[GridPart]:
    """The 2x2 grids that these groups fill, one for each teacher, window, budget or whatever else
    varies.

    Where some grid has two corners or more, those with a single one are left out.
    """
    corners = [group for group in groups if group.entries[0].cell and group.entries[0].evals]
    return partition(corners, GRID_AXES, lambda part: len(part) > 1) or partition(
        corners, GRID_AXES
    )


def budgets(parts: Sequence[GridPart]) -> list[tuple[GridPart, ...]]:
    """Grids at equal steps beside those at equal operations, where there are both."""
    found: dict[str, list[GridPart]] = defaultdict(list)
    for part in parts:
        found[
            recipe_key(part.groups[0].entries[0], (Role.SEED, *GRID_AXES, *BUDGET, *ALIKE))
        ].append(part)
    both = [
        sorted(same, key=has_flops)
        for same in found.values()
        if len({has_flops(part) for part in same}) == 2
    ]
    return [tuple(same) for same in both]


def has_flops(part: GridPart) -> bool:
    """Whether these runs end at a number of operations."""
    recipe = part.groups[0].entries[0].recipe
    return recipe is not None and recipe.train.flops is not None


def forward_weight_sweeps(groups: Sequence[Group]) -> list[GridPart]:
    """Groups that differ in a constant forward weight alone, in its order; pure KLs are its
    ends."""
    found = [group for group in groups if forward_weight(group) is not None]

    def is_sweep(part: Sequence[Group]) -> bool:
        return len(part) > 1 and any(group.entries[0].cell is None for group in part)

    return [
        GridPart(
            part.label, tuple(sorted(part.groups, key=lambda group: forward_weight(group) or 0.0))
        )
        for part in partition(found, SWEEP_AXES, is_sweep)
    ]


def forward_weight(group: Group) -> float | None:
    """The weight of the forward KL where it does not change and the rest is the reverse KL."""
    recipe = group.entries[0].recipe
    if recipe is None or not group.entries[0].evals:
        return None
    if recipe.objective.signal != "full" or not recipe.reward.is_off:
        return None
    if recipe.objective.kl == "mixed" and recipe.weight_schedule.schedule == "constant":
        return recipe.objective.forward_weight
    return {"forward": 1.0, "reverse": 0.0}.get(recipe.objective.kl)


def window_comparisons(groups: Sequence[Group]) -> list[GridPart]:
    """Groups that differ in the window alone, where one of them has a gate."""
    evaluated = [group for group in groups if group.entries[0].evals]
    return partition(
        evaluated, WINDOW_AXES, lambda part: len(part) > 1 and any(map(is_gated, part))
    )


def is_gated(group: Group) -> bool:
    recipe = group.entries[0].recipe
    return recipe is not None and recipe.window.schedule == "entropy-gated"


def rewarded_pairs(groups: Sequence[Group], metrics: Sequence[Metric]) -> list[BeforeAndAfter]:
    """Runs with a reward beside the run or model that they started from, the best end first."""
    starts = find_starts([entry for group in groups for entry in group.entries])
    group_of = {entry.path: group for group in groups for entry in group.entries}
    found = []
    for group in groups:
        after = [entry for entry in group.entries if entry.is_rewarded and entry.path in starts]
        pairs = [(starts[entry.path], entry) for entry in after]
        if pairs:
            differences = {
                m.key: paired_difference(pairs, m) for m in metrics if m.temperature is not None
            }
            begun = tuple({start.path: start for start, _ in pairs}.values())
            before = {
                m.key: summary
                for m in metrics
                if (summary := summarize_entries(begun, m)) is not None
            }
            found.append(
                BeforeAndAfter(
                    Group(group_of[begun[0].path].label, begun, before), group, differences
                )
            )
    best = metrics[0].key if metrics else ""
    return sorted(
        found,
        key=lambda pair: pair.after.summaries[best].value if best in pair.after.summaries else 0.0,
    )[::-1]


def at_temperature(metrics: Sequence[Metric], avg: Metric) -> list[Metric]:
    """Entropy and length at the temperature of this Avg."""
    return [
        replace(metric, temperature=avg.temperature)
        for metric in metrics
        if metric.key in ("entropy", "length")
    ]
