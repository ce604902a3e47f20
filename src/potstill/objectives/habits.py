"""End habits: how likely each end token is to both models where completions end.

Two models can declare the same end tokens and end on different ones. Whoever writes decides where a
completion ends; at the position of its end token both models' probabilities follow from hidden
states, a few rows of each head and the log-sum-exps of the loss, so they are exact and cost next to
nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from potstill.config import Objective
from potstill.kl.head import Head
from potstill.kl.terms import TokenStats
from potstill.runs.schema import EndHabits
from potstill.teachers.ends import Ends, end_names
from potstill.types import Rollout

# Whoever has learnt to end gives one end token much of the probability where completions end. With
# models that have not, each token has about one in the vocabulary, and which end token is likelier
# is chance: a tenth for one of both models lies far from that. The other may not want to end there
# at all; that it prefers another token then shows in how much likelier that is to it.
HABIT, CLEARLY = 0.1, 4.0


def writer_of_ends(objective: Objective) -> str:
    """Whose completions are looked at: the student's where it writes any."""
    return "student" if objective.prefix == "mixed" else objective.prefix


def what_is_unknown(objective: Objective, ends: Ends) -> str | None:
    """Why a run cannot know the teacher's habits, in a line; None where it can or nothing is
    compared."""
    if not ends.compared_ids or objective.signal != "topk":
        return None
    return (
        "which end token the teacher prefers is not known: with objective.signal = "
        '"topk" only its likeliest tokens are'
    )


def positions_of_ends(rollouts: Sequence[Rollout], objective: Objective, ends: Ends) -> list[int]:
    """Which of a batch's loss tokens end a completion of `writer_of_ends`."""
    found, first = [], 0
    for rollout in rollouts:
        first += sum(rollout.trained)
        is_end = rollout.trained[-1] and rollout.completion_ids[-1] in ends.stop_ids
        if is_end and rollout.writers[-1] == writer_of_ends(objective):
            found.append(first - 1)
    return found


@torch.no_grad()
def end_probs(
    hidden_ND: Tensor, head: Head, ids: Sequence[int], log_sum_exp_N: Tensor, temperature: float
) -> Tensor:
    """The probability of each of these K ids, [N, K], under the distribution whose log-sum-exp is
    given."""
    bias = None if head.bias_V is None else head.bias_V[list(ids)]
    rows = dataclasses.replace(head, weight_VD=head.weight_VD[list(ids)], bias_V=bias)
    return (rows(hidden_ND) / temperature - log_sum_exp_N[:, None]).exp()


@torch.no_grad()
def habit_sums(
    rollouts: Sequence[Rollout],
    objective: Objective,
    ends: Ends,
    stats: TokenStats,
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head] | None,
) -> dict[str, float]:
    """Sums over the ends in a batch: how many, and both models' probability of each compared id.

    `student` and `teacher` are hidden states of the loss tokens and a head; the teacher's has no
    part where its log-sum-exps are not known. Nothing at all where there is one end token.
    """
    if not ends.compared_ids:
        return {}
    places = positions_of_ends(rollouts, objective, ends)
    sums = {"num_ends": float(len(places))}
    sides = [("student", student, stats.student_log_sum_exp_N)]
    if teacher is not None and stats.teacher_log_sum_exp_N is not None:
        sides.append(("teacher", teacher, stats.teacher_log_sum_exp_N))
    for who, (hidden, head), log_sum_exp_N in sides:
        probs = end_probs(
            hidden[places], head, ends.compared_ids, log_sum_exp_N[places], objective.temperature
        )
        totals = probs.double().sum(0).tolist()
        sums |= {
            f"end/{who}/{i}": total for i, total in zip(ends.compared_ids, totals, strict=True)
        }
    return sums


def step_habits(
    sums: Mapping[str, float], objective: Objective, ends: Ends, tokenizer
) -> EndHabits:
    """A step's `end_habits` for the run log: whose ends, how many, and mean probabilities by the
    token's name."""
    num = int(sums["num_ends"])
    habits: EndHabits = {"ends_of": writer_of_ends(objective), "num_ends": num}
    names = end_names(tokenizer, ends.compared_ids)
    for who in ("student", "teacher"):
        keys = [f"end/{who}/{i}" for i in ends.compared_ids]
        if num and keys[0] in sums:
            habits[who] = {name: sums[key] / num for name, key in zip(names, keys, strict=True)}
    return habits


def disagreement(habits: EndHabits, ends: Ends, tokenizer) -> str | None:
    """A warning where the two models have the habit of different end tokens; None where they agree
    or have none, or one is not known."""
    if "student" not in habits or "teacher" not in habits:
        return None
    student, teacher = habits["student"], habits["teacher"]
    mine, theirs = max(student, key=student.__getitem__), max(teacher, key=teacher.__getitem__)
    is_habit = max(student[mine], teacher[theirs]) >= HABIT
    are_clear = student[mine] >= CLEARLY * student[theirs]
    are_clear = are_clear and teacher[theirs] >= CLEARLY * teacher[mine]
    if mine == theirs or not is_habit or not are_clear:
        return None
    id_of = dict(zip(end_names(tokenizer, ends.compared_ids), ends.compared_ids, strict=True))
    if {id_of[mine], id_of[theirs]} <= set(ends.class_ids):
        treated = "they are one class in the loss, so that each may go on as it does"
    else:
        treated = (
            "the loss keeps them apart, so that the student is pushed from the one to the other, "
            "and for a while none may end its responses: look at length and truncation"
        )
    return (
        f"where the {habits['ends_of']}'s completions end, the student would end with "
        f"{mine} ({student[mine]:.1%}, the teacher {teacher[mine]:.1%}) and the teacher with "
        f"{theirs} ({teacher[theirs]:.1%}, the student {student[theirs]:.1%}); {treated}"
    )
