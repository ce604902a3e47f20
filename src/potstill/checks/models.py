"""Checks of both models on what they write: ends, alignment, precision, and how far apart they
are."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from potstill.checks.finding import Finding, Subject, Written
from potstill.kl.fused import fused_statistics
from potstill.kl.head import Head
from potstill.kl.terms import TokenStats
from potstill.models.language_model import LanguageModel
from potstill.models.probe import logits_error
from potstill.objectives.habits import disagreement, habit_sums, step_habits
from potstill.objectives.loss import student_rows
from potstill.prompts.overview import marked
from potstill.teachers.cached import CachedTeacher
from potstill.teachers.protocol import Teacher
from potstill.types import Rollout

# A KL(self || self) of this many nats a token is rounding, in float32; in lower types it may be
# this share of the KL that is to be learnt.
ROUNDING, NOISE = 1e-5, 0.1
# Nats a token below which two models are one.
SAME = 1e-6
# Share of the largest entropy, above which a model has learnt nothing.
KNOWS_NOTHING = 0.9
# Share of responses that the window may cut before it is a warning.
MANY_CUT_RESPONSES = 0.5
# Probability of rows that are cut off, above which it is a warning.
MUCH_CUT_OFF = 0.01
# So many characters of a rollout are shown.
ROLLOUT_CHARACTERS = 160


def head(subject: Subject) -> Finding:
    """Whether hidden states times head are each model's own logits."""
    errors, limits = {}, {}
    for who, model in subject.models().items():
        errors[who], limits[who] = logits_error(model)
    says = "logits differ from hidden states times head by " + ", ".join(
        f"{errors[who]:.1e} ({who}; rounding allows {limits[who]:.1e})" for who in errors
    )
    measured = {f"{who}_error": error for who, error in errors.items()}
    if all(errors[who] <= limits[who] for who in errors):
        return Finding(check="head", level="ok", says=says, measured=measured)
    fix = "the loss would be of another model than the one that writes; choose another model"
    return Finding(check="head", level="error", says=says, fix=fix, measured=measured)


def loss_tokens(subject: Subject, written: Written) -> Finding:
    """Which tokens of the first rollout count in the loss, between [ and ]."""
    rollout = written.step[0]
    num = sum(sum(each.trained) for each in written.step)
    num_all = sum(len(each.completion_ids) for each in written.step)
    says = f"{num} of {num_all} completion tokens count; the first ones: " + begun_with_marks(
        rollout, subject.student.tokenizer
    )
    measured = {"num_loss_tokens": num, "num_completion_tokens": num_all}
    # Where the loss is of spans, metrics say how many tokens are in none.
    is_of_spans = subject.loss.translation is not None
    if num and (rollout.trained[-1] or rollout.stop != "end" or is_of_spans):
        return Finding(check="loss tokens", level="ok", says=says, measured=measured)
    fix = "train on the assistant's words, and on the token that ends them"
    return Finding(check="loss tokens", level="error", says=says, fix=fix, measured=measured)


def begun_with_marks(rollout: Rollout, tokenizer) -> str:
    """The end of a prompt and the beginning of its completion, with loss tokens in brackets."""
    text = marked(rollout.completion_ids, rollout.trained, tokenizer, marks=("[", "]"))
    prompt = tokenizer.decode(rollout.prompt.token_ids)
    shown = text if len(text) <= ROLLOUT_CHARACTERS else f"{text[:ROLLOUT_CHARACTERS]}..."
    return repr(prompt[-ROLLOUT_CHARACTERS // 4 :] + shown)


def end_masses(subject: Subject, written: Written) -> Finding:
    """The probability that each model puts on each end token where the student's responses end."""
    check, teacher = "end masses", subject.teacher
    ended = [rollout for rollout in written.student if rollout.stop == "end"]
    if not ended:
        says = f"none of the student's {len(written.student)} responses ended"
        return Finding(check=check, level="skipped", says=says)
    ends = subject.ends
    ends = dataclasses.replace(ends, compared_ids=ends.compared_ids or ends.stop_ids)
    objective = subject.recipe.objective.model_copy(update={"prefix": "student"})
    batch = subject.batch_of(ended)
    mine, theirs = _student_side(subject, batch), _teacher_side(subject, batch)
    stats = _statistics(subject, mine, theirs, end_ids=())
    sums = habit_sums(batch.rollouts, objective, ends, stats, mine, theirs)
    habits = step_habits(sums, objective, ends, subject.student.tokenizer)
    known = {"student": habits.get("student"), "teacher": habits.get("teacher")}
    masses = {who: of_each for who, of_each in known.items() if of_each is not None}
    says = f"where {len(ended)} of the student's responses end: " + "; ".join(
        f"{who} " + ", ".join(f"{name} {mass:.1%}" for name, mass in of_each.items())
        for who, of_each in masses.items()
    )
    measured = {"num_ends": len(ended), **masses}
    differ = disagreement(habits, ends, subject.student.tokenizer)
    if differ is None:
        says += "" if teacher is None or theirs is not None else "; the teacher's is not known"
        return Finding(check=check, level="ok", says=says, measured=measured)
    is_merged = bool(ends.class_ids)
    fix = (
        "the loss counts them as one class; look at length and truncation all the same"
        if is_merged
        else 'set objective.end_class = "merged", or give both models one end token'
    )
    level = "warning" if is_merged else "error"
    return Finding(check=check, level=level, says=says, fix=fix, measured=measured)


def shift(subject: Subject, written: Written) -> Finding:
    """Whether a writer's own text is likelier to it than the same text shifted by one token."""
    check = "alignment"
    who = "teacher" if written.teacher else "student"
    rollouts = written.teacher or written.student
    batch = subject.batch_of(rollouts)
    side = _teacher_side(subject, batch) if who == "teacher" else _student_side(subject, batch)
    if side is None:
        return Finding(check=check, level="skipped", says="the teacher's hidden states are unknown")
    hidden_ND, model_head = side
    places = {"as it is": 0, "one later": 1, "one earlier": -1}
    log_probs = {
        name: _shifted_log_prob(subject, rollouts, hidden_ND, model_head, by)
        for name, by in places.items()
    }
    measured = {"writer": who} | {name.replace(" ", "_"): x for name, x in log_probs.items()}
    says = f"the {who}'s log-probability of its own tokens is " + ", ".join(
        f"{value:.2f} {name}" for name, value in log_probs.items()
    )
    others = [value for name, value in log_probs.items() if name != "as it is"]
    if all(math.isnan(value) or value <= log_probs["as it is"] for value in others):
        return Finding(check=check, level="ok", says=says, measured=measured)
    fix = f"the loss would teach other tokens than the {who} means: choose another model"
    return Finding(check=check, level="error", says=says, fix=fix, measured=measured)


def _shifted_log_prob(
    subject: Subject, rollouts: Sequence[Rollout], hidden_ND: Tensor, model_head: Head, by: int
) -> float:
    """The mean log-probability of the token `by` places after the one that each position is
    about; NaN where no rollout is long enough."""
    rows, labels, first = [], [], 0
    for rollout in rollouts:
        trained = [i for i, is_trained in enumerate(rollout.trained) if is_trained]
        for row, place in enumerate(trained):
            if 0 <= place + by < len(rollout.completion_ids):
                rows.append(first + row)
                labels.append(rollout.completion_ids[place + by])
        first += len(trained)
    if not rows:
        return math.nan
    labels_N = torch.tensor(labels, device=hidden_ND.device)
    stats = fused_statistics(
        hidden_ND[rows], model_head, labels_N=labels_N, **_options(subject, end_ids=())
    )
    assert stats.student_log_prob_N is not None, "labels are given"
    return stats.student_log_prob_N.double().mean().item()


def self_kl(subject: Subject, written: Written) -> Finding:
    """The KL of the student to itself, as the step computes it and as it writes: 0 but for
    rounding."""
    recipe, student = subject.recipe, subject.student
    batch = subject.batch_of(written.step)
    plain = student(batch.input_ids_BT)[batch.loss_mask_BT]
    with _learning(student, recipe.student.dropout):
        hidden_ND = student_rows(student, batch, subject.loss)
    options = _options(subject, end_ids=subject.loss.end_class)
    stats = fused_statistics(hidden_ND, student.head, plain, student.head, **options)
    value = _mean(stats.forward_kl_N)
    measured = {"nats": value, "compute_dtype": subject.loss.compute_dtype}
    to_learn = _start(subject, written)
    says = f"{value:.1e} nats a token, computing in {subject.loss.compute_dtype}"
    if to_learn is not None:
        measured |= {"to_learn": _mean(to_learn.forward_kl_N)}
        says += f", and {measured['to_learn']:.2g} are to be learnt"
    if not value <= max(ROUNDING, NOISE * measured.get("to_learn", 0.0)):
        fix = 'set train.compute_dtype = "float32"'
        if recipe.student.dropout:
            fix = "set student.dropout = false: the loss is of another model than writes"
        level = "warning" if recipe.student.dropout or value < 1 else "error"
        return Finding(check="self KL", level=level, says=says, fix=fix, measured=measured)
    return Finding(check="self KL", level="ok", says=says, measured=measured)


def start_kl(subject: Subject, written: Written) -> Finding:
    """How far apart the models are where the first step trains: there is something to learn, from
    a teacher that knows something."""
    check, stats = "start", _start(subject, written)
    if stats is None:
        return Finding(check=check, level="skipped", says="no teacher's hidden states are known")
    forward, reverse = _mean(stats.forward_kl_N), _mean(stats.reverse_kl_N)
    entropies = {"student": _mean(stats.student_entropy_N)}
    entropies["teacher"] = _mean(stats.teacher_entropy_N)
    measured = {"forward_kl": forward, "reverse_kl": reverse}
    measured |= {f"{who}_entropy": value for who, value in entropies.items()}
    says = (
        f"KL forward {forward:.3g}, reverse {reverse:.3g} nats a token; entropy "
        f"{entropies['student']:.2f} (student), {entropies['teacher']:.2f} (teacher)"
    )
    if forward < SAME and reverse < SAME:
        fix = "give a teacher that is another model, or that reads something else"
        says = f"{says}: there is nothing to learn"
        return Finding(check=check, level="warning", says=says, fix=fix, measured=measured)
    largest = math.log(subject.loss.vocab_size or subject.student.vocab_size)
    if entropies["teacher"] > KNOWS_NOTHING * largest:
        fix = "look at the teacher's files: its weights seem to be random"
        says = f"{says}: the teacher is nearly undecided among all {math.exp(largest):,.0f} tokens"
        return Finding(check=check, level="error", says=says, fix=fix, measured=measured)
    return Finding(check=check, level="ok", says=says, measured=measured)


def vocabulary(subject: Subject, written: Written) -> Finding:
    """The probability of head rows that the loss cuts off, at each model's own tokens."""
    check, size = "vocabulary", subject.loss.vocab_size
    if subject.loss.translation is not None:
        return Finding(check=check, level="skipped", says="each model has tokens of its own")
    masses = {}
    for who, model in subject.models().items():
        if size is not None and model.vocab_size > size:
            batch = subject.batch_of(written.step)
            masses[who] = _mass_beyond(model.signal_at(batch), model.head, size)
    if not masses:
        num = size or subject.student.vocab_size
        return Finding(check=check, level="ok", says=f"all {num:,} rows of both heads are shared")
    says = f"heads are cut to {size:,} rows; the rest have a probability of " + ", ".join(
        f"{mass:.1e} ({who}'s {subject.models()[who].vocab_size:,} rows)"
        for who, mass in masses.items()
    )
    measured = {"rows": size, **masses}
    if max(masses.values()) <= MUCH_CUT_OFF:
        return Finding(check=check, level="ok", says=says, measured=measured)
    fix = "choose a model whose tokens the other one has too: what is cut off is not learnt"
    return Finding(check=check, level="warning", says=says, fix=fix, measured=measured)


def _mass_beyond(hidden_ND: Tensor, model_head: Head, size: int) -> float:
    whole, cut = (
        fused_statistics(hidden_ND, model_head, vocab_size=rows).student_log_sum_exp_N
        for rows in (None, size)
    )
    return max(_mean(1 - (cut - whole).exp()), 0.0)


def truncation(subject: Subject, written: Written) -> Finding:
    """How many responses of each model the window cuts."""
    check = "window"
    sides = {"student": written.student, "teacher": written.teacher}
    shares = {
        who: sum(rollout.stop == "length" for rollout in rollouts) / len(rollouts)
        for who, rollouts in sides.items()
        if rollouts
    }
    says = ", ".join(
        f"{share:.0%} of the {who}'s {len(sides[who])}" for who, share in shares.items()
    )
    says = f"{says} responses are longer than {written.window} tokens"
    measured = {f"{who}_truncation": share for who, share in shares.items()}
    measured |= {"window": written.window}
    many = [who for who, share in shares.items() if share > MANY_CUT_RESPONSES]
    if not written.is_whole and many:
        says += f", for which there was time; the window is {subject.recipe.window.tokens}"
        return Finding(check=check, level="skipped", says=says, measured=measured)
    if not many:
        return Finding(check=check, level="ok", says=says, measured=measured)
    fix = "raise window.tokens: no end that comes later is learnt"
    return Finding(check=check, level="warning", says=says, fix=fix, measured=measured)


@contextlib.contextmanager
def _learning(student: LanguageModel, has_dropout: bool) -> Iterator[None]:
    """The student as the step trains it."""
    student.train(has_dropout)
    try:
        yield
    finally:
        student.eval()


def _options(subject: Subject, end_ids: Sequence[int]):
    return subject.loss.shared_options() | {"end_ids": end_ids, "backend": "eager"}


def _student_side(subject: Subject, batch) -> tuple[Tensor, Head]:
    return student_rows(subject.student, batch, subject.loss), subject.student.head


def _teacher_side(subject: Subject, batch) -> tuple[Tensor, Head] | None:
    """The teacher's hidden states and head; None where they are not known."""
    teacher = subject.teacher if subject.loss.translation is None else None
    can_score = teacher is not None and (teacher.can_score or _is_cached(teacher, batch.rollouts))
    if teacher is None or teacher.head is None or not can_score:
        return None
    signal = teacher.signal_at(batch)
    return (signal, teacher.head) if isinstance(signal, Tensor) else None


def _is_cached(teacher: Teacher, rollouts: Sequence[Rollout]) -> bool:
    """Whether the cache that is the teacher has these rollouts, and so their signal."""
    if not isinstance(teacher, CachedTeacher):
        return False
    for rollout in rollouts:
        if rollout.prompt.cached is None:
            return False
        there = teacher.cache.rollout(rollout.prompt, len(rollout.completion_ids))
        if there.completion_ids != rollout.completion_ids:
            return False
    return True


def _statistics(subject: Subject, mine, theirs, end_ids: Sequence[int]) -> TokenStats:
    return fused_statistics(*mine, *(theirs or (None, None)), **_options(subject, end_ids))


def _start(subject: Subject, written: Written) -> TokenStats | None:
    """The statistics of the first step's loss tokens; None without the teacher's hidden states."""
    if "start" not in written.known:
        batch, found = subject.batch_of(written.step), None
        theirs = _teacher_side(subject, batch)
        if theirs is not None:
            mine = _student_side(subject, batch)
            found = _statistics(subject, mine, theirs, end_ids=subject.loss.end_class)
        written.known["start"] = found
    return written.known["start"]


def _mean(values_N: Tensor | None) -> float:
    assert values_N is not None, "both models are given"
    return values_N.double().mean().item()
