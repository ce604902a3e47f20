"""The opening of a report: what was compared, which is best by how much, what to look at, and one
picture."""

from collections.abc import Sequence
from typing import NamedTuple

from potstill.config import Role, role_of
from potstill.report import figures
from potstill.report.comparison import Group, flat, pair_up, paired_difference
from potstill.report.figures import Figure, Link, Row
from potstill.report.findings import (
    NUM_NAMED,
    different_ends,
    named,
    ranked_groups,
    seeds_of,
    values,
)
from potstill.report.numbers import PanelResult
from potstill.report.tables import settings_warning
from potstill.report.validation import prompts_in_words, value_and_interval
from potstill.runs.quantities import SHOWN
from potstill.runs.results import Entry
from potstill.runs.schema import quantity_in, value_in
from potstill.statistics import SEEDS_TO_JUDGE, seeds_in_words

# Quantities of a validation that rank students where no task does, the first that is there: 1 where
# more is better, -1 where less is.
QUALITIES = {
    "judged": 1,
    "score": 1,
    "student_prefix_reverse_kl": -1,
    "teacher_prefix_forward_kl": -1,
}
# How many fields a sentence names, how many values of each, and how many rows the picture has.
NUM_FIELDS, NUM_VALUES, NUM_ROWS = 3, 3, 12
# Shares of cut completions, and of the teacher's entropy, from which on they are spoken of.
MANY_CUT, LITTLE_ENTROPY = 0.2, 0.5
NOT_MEASURED = (
    "How good the students are was not measured: num_prompts in section [validation] of the recipe "
    "measures them on prompts that are held out as they learn, and `potstill evaluate RUN "
    "--prompts FILE` when they are done."
)


class Measured(NamedTuple):
    """A run's last validation of one quantity: its name, and value, low and high as stored."""

    entry: Entry
    label: str
    estimate: Sequence[float]


def title_of(results: Sequence[PanelResult]) -> str:
    """The names of what a report compares; of studies, their panels' titles."""
    names = [result.panel.title for result in results if result.panel.title]
    names = names or [group.label for result in results for group in result.groups]
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - NUM_VALUES} more" if len(names) > NUM_VALUES else ""
    return (", " if more else " and ").join(names[:NUM_VALUES]) + more


def sentences_of(result: PanelResult) -> list[str]:
    """Three sentences: what was compared, which is best, and what to look at."""
    return [compared(result), best_of(result), look_at(result)]


def compared(result: PanelResult) -> str:
    """A sentence on the runs and the fields of their recipes that differ."""
    groups, runs = result.groups, [e for e in result.panel.entries if e.recipe is not None]
    num_models = len(result.panel.entries) - len(runs)
    counted = [(len(runs), "run"), (num_models, "model")]
    what = " and ".join(f"{n} {name}{'s' if n > 1 else ''}" for n, name in counted if n)
    about = f"{what}: {named(groups)}"
    fields = [flat(entry) for entry in runs]
    names = dict.fromkeys(name for each in fields for name in each)
    differing = {}
    for name in names:
        found = list(dict.fromkeys(str(each[name]) for each in fields if name in each))
        if len(found) > 1 and role_of(name) is not Role.SEED:
            differing[name] = found
    if len(runs) < 2:
        return f"{about}."
    if not differing:
        return f"{about}. The recipes differ in seeds alone."
    texts = [f"{name} ({_some(found)})" for name, found in list(differing.items())[:NUM_FIELDS]]
    num_more = len(differing) - NUM_FIELDS
    more = f" and {num_more} more field{'s' if num_more > 1 else ''}" if num_more > 0 else ""
    return f"{about}. The recipes differ in {', '.join(texts)}{more}."


def _some(found: Sequence[str]) -> str:
    more = ", ..." if len(found) > NUM_VALUES else ""
    return ", ".join(found[:NUM_VALUES]) + more


def best_of(result: PanelResult) -> str:
    """A sentence on which is best by how much, or that it cannot be told."""
    ranked = _ranked(result)
    if ranked:
        return _best_score(result, ranked)
    measured = last_validations(result)
    if measured is None:
        return NOT_MEASURED
    return _best_validation(*measured)


def _ranked(result: PanelResult) -> list[Group]:
    avg = next((metric for metric in result.metrics if metric.column == "avg"), None)
    return [] if avg is None else ranked_groups(result.groups, result.rewarded, avg)


def _best_score(result: PanelResult, ranked: Sequence[Group]) -> str:
    avg = next(metric for metric in result.metrics if metric.column == "avg")
    best = ranked[0]
    facts = f"{best.label} with {avg.title} {values(best, [avg])[0]} %"
    if len(ranked) == 1:
        return f"Measured is {facts}{seeds_of(best)}; there is nothing to compare it with."
    second = ranked[1]
    pairs = pair_up(second, best)
    effect = paired_difference(pairs, avg)
    if effect is None:
        return (
            f"Highest is {facts}; how far it is from {second.label} cannot be told, as they share "
            "no seeds and problems."
        )
    points, low, high = (f"{avg.scale * end:.1f}" for end in effect)
    ahead = f"{points} points [{low}, {high}] ahead of {second.label}"
    if effect.low <= 0:
        return (
            f"Which is best cannot be told: highest is {facts}, {ahead}, an interval that "
            "includes 0."
        )
    if best.entries[0].recipe is not None and len(pairs) < SEEDS_TO_JUDGE:
        return (
            f"Highest is {facts}, {ahead}, over {seeds_in_words(len(pairs))}: a direction and no "
            f"ranking, which takes {SEEDS_TO_JUDGE} seeds."
        )
    return f"Best is {facts}, {ahead}."


def last_validations(result: PanelResult) -> tuple[str, list[Measured]] | None:
    """The quantity that ranks validated runs, and each run's last value, the best first."""
    runs = [entry for entry in result.panel.entries if entry.validations]
    for name, sign in QUALITIES.items():
        found = []
        for run in runs:
            estimate = quantity_in(run.validations[-1], name)
            if estimate is not None:
                found.append(Measured(run, result.labels[run.path], estimate))
        if found:
            return name, sorted(found, key=lambda each: -sign * each.estimate[0])
    return None


def _best_validation(name: str, measured: Sequence[Measured]) -> str:
    shown, best = SHOWN[name], measured[0]
    first, last = quantity_in(best.entry.validations[0], name), best.entry.validations[-1]
    before = f", {shown.scale * first[0]:.{shown.digits}f} before training" if first else ""
    about = f"{best.label} at {value_and_interval(last, name)}{before}"
    over = f"{shown.title} on {prompts_in_words(last['num_prompts'])} not trained on"
    if len(measured) == 1:
        return f"There is no score of a task; {over}: {about}."
    second = measured[1]
    end = f"{second.label} is at {shown.scale * second.estimate[0]:.{shown.digits}f}"
    if last["num_prompts"] == 1:
        return (
            f"Which is best cannot be told by {over}: {about} and {end}, and one prompt has no "
            "interval."
        )
    low, high = sorted((best.estimate, second.estimate), key=lambda each: each[0])
    if low[2] >= high[1]:
        return (
            f"Which is best cannot be told by {over}: {about} and {end}, and their intervals "
            "overlap."
        )
    return f"Best by {over} is {about}; {end}, and their intervals do not overlap."


def look_at(result: PanelResult) -> str:
    """A sentence on the first thing that is unlike what one hopes for, else on where to read on."""
    runs = [entry for entry in result.panel.entries if entry.metrics]
    warning = settings_warning(result.panel.entries)
    ends = different_ends(runs)
    crashed = [state for _, state in result.panel.unfinished if state.startswith("crashed")]
    if crashed:
        return f"Look first at the runs without a result: {len(crashed)} crashed."
    if warning:
        return warning[0].replace("WARNING: the", "Beware: the")
    if ends:
        return f"Look at the end habits: {ends[0][0][0].lower()}{ends[0][0][1:]}"
    cut = [run for run in runs if (value_in(run.metrics[-1], "truncation") or 0.0) >= MANY_CUT]
    if cut:
        return (
            f"Look at the lengths: the window cuts {MANY_CUT:.0%} or more of the completions at "
            f"the last step of {_names(cut, result)}."
        )
    sharp = [run for run in runs if _is_sharp(run)]
    if sharp:
        return (
            "Look at the entropies: at the last step the student's is less than half of the "
            f"teacher's in {_names(sharp, result)}."
        )
    logged = " and the rollouts, token by token" if any(run.samples for run in runs) else ""
    return f"Nothing stands out; look at the curves of training{logged}."


def _is_sharp(run: Entry) -> bool:
    """Whether the student's entropy ends far below the teacher's."""
    student = value_in(run.metrics[-1], "student_entropy_before_answer")
    teacher = value_in(run.metrics[-1], "teacher_entropy_before_answer")
    return student is not None and teacher is not None and student < LITTLE_ENTROPY * teacher


def _names(runs: Sequence[Entry], result: PanelResult) -> str:
    more = f" and {len(runs) - NUM_NAMED} more" if len(runs) > NUM_NAMED else ""
    return "; ".join(result.labels[run.path] for run in runs[:NUM_NAMED]) + more


def picture(result: PanelResult, link: Link) -> Figure | None:
    """The best groups or runs beside each other with their intervals; None without a quality."""
    ranked, rows = _ranked(result), []
    if ranked:
        avg = next(metric for metric in result.metrics if metric.column == "avg")
        name, scale = f"{avg.title} (%)", avg.scale
        for group in ranked[:NUM_ROWS]:
            found = group.summaries[avg.key]
            estimate = (found.value, found.low, found.high)
            rows.append(_row(group.label, group.entries[0], estimate, scale, link))
    elif measured := last_validations(result):
        name, scale = SHOWN[measured[0]].title, SHOWN[measured[0]].scale
        for entry, label, estimate in measured[1][:NUM_ROWS]:
            rows.append(_row(label, entry, estimate, scale, link))
    else:
        return None
    return figures.ranking_bars(name, rows, result.styles)


def _row(
    label: str, entry: Entry, estimate: Sequence[float | None], scale: float, link: Link
) -> Row:
    value, low, high = (None if end is None else scale * end for end in estimate)
    assert value is not None
    return Row(label, entry.path, link(entry.path), value, low, high)
