"""Findings of a report in sentences, and its numbers as text.

What is said of training takes three seeds. An interval over problems alone is about the models that
there are: another seed, or the rounding of another machine, can turn over what it seems to show.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from potstill.report.comparison import BeforeAndAfter, Group, pair_up, paired_difference
from potstill.report.metrics import Metric
from potstill.runs.results import Entry
from potstill.runs.schema import EndHabits
from potstill.statistics import SEEDS_TO_JUDGE, seeds_in_words

# How many names a sentence lists.
NUM_NAMED = 6

ModelSide = Literal["student", "teacher"]
SIDES: tuple[ModelSide, ...] = ("student", "teacher")

# With the run folders that it speaks of.
Sentence = tuple[str, list[Path]]


class StepHabits(EndHabits):
    """End habits and the step that they are of."""

    step: int


def findings(
    metrics: Sequence[Metric], groups: Sequence[Group], rewarded: Sequence[BeforeAndAfter]
) -> list[Sentence]:
    """The findings, in sentences computed from the numbers, each with the runs it speaks of."""
    by_key = {metric.key: metric for metric in metrics}
    about_ends = different_ends([entry for group in groups for entry in group.entries])
    avg = next((metric for metric in metrics if metric.column == "avg"), None)
    if avg is None:
        return about_ends
    trained = ranked_groups(groups, rewarded, avg)
    best = trained[0]
    facts = f"{best.label} with {values(best, [avg])[0]} %{seeds_of(best)}"
    first = f"Highest {avg.title} of {len(trained)} settings" if len(trained) > 1 else avg.title
    sentences = [(f"{first}: {facts}.", [entry.path for entry in best.entries])]
    sentences += ranking(best, trained[1:], avg)
    cost = by_key.get("gflops") or by_key.get("seconds")
    costed = [group for group in trained if cost is not None and cost.key in group.summaries]
    if cost is not None and len(costed) > 1:
        cheapest = min(costed, key=lambda group: group.summaries[cost.key].value)
        text = (
            f"Cheapest by {cost.title}: {cheapest.label} with {values(cheapest, [cost])[0]} "
            f"{cost.unit} and {avg.title} {values(cheapest, [avg])[0]} %."
        )
        sentences.append((text, [entry.path for entry in cheapest.entries]))
    if rewarded and avg.key in rewarded[0].after.summaries:
        pair = rewarded[0]
        text = (
            f"Best end of reinforcement learning: {pair.after.label}, {avg.title} "
            f"{values(pair.before, [avg])[0]} % before and {values(pair.after, [avg])[0]} % "
            f"after{seeds_of(pair.after)}."
        )
        sentences.append(
            (text, [entry.path for group in (pair.before, pair.after) for entry in group.entries])
        )
    return sentences + about_ends


def ranked_groups(
    groups: Sequence[Group], rewarded: Sequence[BeforeAndAfter], avg: Metric
) -> list[Group]:
    """The groups with this accuracy, the best first: runs, or all where there is none.

    Runs with a reward that go on from a run are compared with that one alone.
    """
    scored = [group for group in groups if avg.key in group.summaries]
    later = {pair.after.label for pair in rewarded if pair.before.entries[0].recipe is not None}
    runs = [
        group
        for group in scored
        if group.entries[0].recipe is not None and group.label not in later
    ]
    return sorted(runs or scored, key=lambda group: -group.summaries[avg.key].value)


def ranking(best: Group, others: Sequence[Group], avg: Metric) -> list[Sentence]:
    """Sentences on which groups are below the best: decided by three seeds or more, else a
    direction and a size.

    Models that no run has made are compared as they are, over problems alone.
    """
    undecided, below, few, unknown, leads = [], [], [], [], []
    for group in others:
        pairs = pair_up(group, best)
        effect = paired_difference(pairs, avg)
        is_trained = any(each.entries[0].recipe is not None for each in (group, best))
        if effect is None:
            unknown.append(group)
        elif is_trained and len(pairs) < SEEDS_TO_JUDGE:
            few.append(group)
            leads.append(
                f"{group.label} by {avg.scale * effect.value:.1f} ({seeds_in_words(len(pairs))})"
            )
        else:
            (undecided if effect.low <= 0 else below).append(group)
    interval = (
        f"interval over {'problems' if best.entries[0].recipe is None else 'seeds and problems'}"
    )
    more = f" and {len(few) - NUM_NAMED} more" if len(few) > NUM_NAMED else ""
    sentences = [
        (
            f"Undecided, as the 95 % {interval} of the difference to it includes 0: "
            f"{named(undecided)}.",
            undecided,
        ),
        (
            f"Below it by an {interval} that excludes 0: {len(below)} of {len(others)} others.",
            below,
        ),
        (
            f"A direction and no ranking, which takes {SEEDS_TO_JUDGE} seeds: in points it is "
            f"ahead of {'; '.join(leads[:NUM_NAMED])}{more}.",
            few,
        ),
        (
            f"Not compared with it, for want of the same seeds and problems: {named(unknown)}.",
            unknown,
        ),
    ]
    return [
        (text, [entry.path for group in about[:NUM_NAMED] for entry in group.entries])
        for text, about in sentences
        if about
    ]


def first_and_last_habits(entry: Entry) -> list[StepHabits]:
    """A run's end habits at the first and the last step in which a completion ended, each with its
    step; or fewer."""
    rows: list[StepHabits] = [
        {**row["end_habits"], "step": row["step"]}
        for row in entry.metrics
        if "end_habits" in row and row["end_habits"]["num_ends"]
    ]
    return rows[:1] + rows[1:][-1:]


def probs_of(habits: EndHabits, who: ModelSide) -> dict[str, float]:
    """The probability that a model gives each end token; none where it is not known."""
    return habits.get(who, {})


def ends_alike(habits: EndHabits) -> bool | None:
    """Whether both models' likeliest end token is the same; None where one is not known."""
    sides = [probs_of(habits, who) for who in SIDES]
    likeliest = {max(side, key=side.__getitem__) for side in sides if side}
    return len(likeliest) == 1 if all(sides) else None


def different_ends(entries: Sequence[Entry]) -> list[Sentence]:
    """A sentence on runs whose two models end with different tokens; none where there are none."""
    compared = [(entry, found) for entry in entries if (found := first_and_last_habits(entry))]
    first, last = ([e for e, found in compared if ends_alike(found[i]) is False] for i in (0, -1))
    if not first and not last:
        return []
    text = (
        f"Student and teacher are likeliest to end with different tokens in {len(first)} of "
        f"{len(compared)} runs at first, and in {len(last)} at last."
    )
    return [(text, [entry.path for entry in first or last])]


def habit_table(entries: Sequence[Entry]) -> tuple[list[str], list[tuple[Entry, list[str]]]]:
    """Header and rows of the end habits: of each run whose ends, and each token's probability,
    first to last."""
    compared = [(entry, found) for entry in entries if (found := first_and_last_habits(entry))]
    names = dict.fromkeys(
        name for _, found in compared for row in found for name in probs_of(row, "student")
    )
    columns: list[tuple[ModelSide, str]] = [(who, name) for name in names for who in SIDES]
    rows = []
    for entry, found in compared:
        cells = [f"the {found[0]['ends_of']}'s"]
        cells += [_to(row["step"] for row in found), _to(row["num_ends"] for row in found)]
        for who, name in columns:
            probs = [probs_of(row, who) for row in found]
            known = _to(f"{each[name]:.3f}" for each in probs if name in each)
            cells.append(known or ("not known" if name in probs_of(found[0], "student") else ""))
        alike = {True: "yes", False: "no", None: "not known"}
        rows.append((entry, [*cells, _to(alike[ends_alike(row)] for row in found)]))
    return [
        "run",
        "completions",
        "step",
        "ends",
        *(f"{who}: {name}" for who, name in columns),
        "alike",
    ], rows


def _to(values: Iterable[object]) -> str:
    return " → ".join(str(value) for value in values)


def seeds_of(group: Group) -> str:
    """How many seeds a group of runs has, in brackets, and what its interval leaves out; empty of a
    model."""
    if group.entries[0].recipe is None:
        return ""
    alone = "; the interval is over problems alone" if len(group.entries) == 1 else ""
    return f" ({seeds_in_words(len(group.entries))}{alone})"


def named(groups: Sequence[Group]) -> str:
    """The labels of these groups, the first few of many."""
    more = f" and {len(groups) - NUM_NAMED} more" if len(groups) > NUM_NAMED else ""
    return "; ".join(group.label for group in groups[:NUM_NAMED]) + more


def values(group: Group, metrics: Sequence[Metric]) -> list[str]:
    """A group's metrics as text, empty where it has none."""
    found = [(group.summaries.get(metric.key), metric) for metric in metrics]
    return [
        ""
        if summary is None
        else number_text(
            (summary.value,) if summary.low is None else (summary.value, summary.low, summary.high),
            metric,
        )
        for summary, metric in found
    ]


def number_text(estimate: Sequence[float | None] | None, metric: Metric, sign: str = "") -> str:
    """A value, and its interval where it has one, as text; empty without a value."""
    if estimate is None:
        return ""
    digits = metric.digits
    if metric.temperature is None and estimate[0]:
        digits = max(0, 2 - math.floor(math.log10(abs(metric.scale * estimate[0]))))
    value, *bounds = (f"{metric.scale * x:{sign},.{digits}f}" for x in estimate if x is not None)
    return f"{value} [{', '.join(bounds)}]" if bounds else value
