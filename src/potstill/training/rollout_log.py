"""A few rollouts for the run log, with the numbers of each loss token and the likeliest tokens of
both models.

They are made of what the pass of the loss has computed, as far as it goes.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from potstill.kl.fused import fused_statistics
from potstill.kl.terms import TokenStats
from potstill.kl.topk import TopK, top_k_loss, top_k_of
from potstill.models.language_model import LanguageModel
from potstill.objectives.loss import (
    Heard,
    Loss,
    batch_loss,
    known_of_teacher,
    signal_of,
    student_rows,
)
from potstill.rollouts.batching import make_batch
from potstill.runs.schema import Choice, Sample, SampleChoices, SampleNumbers, SamplePrompt
from potstill.teachers.protocol import OfWritten, Teacher
from potstill.training.metrics import TOKEN_STATISTICS
from potstill.types import Rollout

# Tokens of each model that are logged at each loss token, the likeliest first.
NUM_CHOICES = 5
LOGGED_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Results of a pass of the loss for its N loss tokens: the student's hidden states [N, D],
    `known_of_teacher`, the loss of each, and the statistics of both at the temperature of the loss.
    """

    hidden_ND: torch.Tensor
    known: Heard | None
    loss_N: torch.Tensor
    stats: TokenStats

    def each(self, rollouts: Sequence[Rollout]) -> Iterator["Scored"]:
        """That of every rollout of the batch, as views without a gradient."""
        first = 0
        for rollout in rollouts:
            yield _rows(self, slice(first, first := first + sum(rollout.trained)))


def of_students_tokens(known: Heard | None, loss: Loss) -> Heard | None:
    """The part of `known_of_teacher` that is about the student's tokens: nothing where the teacher
    has others."""
    return known if loss.translation is None else None


def _rows(value: Any, rows: slice) -> Any:
    """The same rows of every tensor in a value."""
    if isinstance(value, torch.Tensor):
        return value.detach()[rows]
    if value is None:
        return None
    parts = {
        field.name: _rows(getattr(value, field.name), rows) for field in dataclasses.fields(value)
    }
    return type(value)(**parts)


@torch.no_grad()
def scored_samples(
    student: LanguageModel,
    teacher: Teacher | None,
    rollouts: Sequence[Rollout],
    loss: Loss,
    device: torch.device,
) -> list[Sample]:
    """`logged_sample` of each rollout, after a pass of its own. Ranks must call this together."""
    batch = make_batch(rollouts, device)
    known = known_of_teacher(teacher, batch, loss)
    hidden_ND = student_rows(student, batch, loss)
    signal = signal_of(known, teacher, batch, loss)
    _, loss_N, stats = batch_loss(student, teacher, signal, batch, loss, hidden_ND=hidden_ND)
    told = of_students_tokens(known, loss)
    each = Scored(hidden_ND=hidden_ND, known=told, loss_N=loss_N, stats=stats).each(rollouts)
    return [
        logged_sample(student, teacher, *pair, loss) for pair in zip(rollouts, each, strict=True)
    ]


@torch.no_grad()
def logged_sample(
    student: LanguageModel, teacher: Teacher | None, rollout: Rollout, scored: Scored, loss: Loss
) -> Sample:
    """A rollout as plain data. What the loss does not know takes products of the heads: the
    likeliest tokens always, whole distributions for `signal` "topk" and "sampled" and for another
    temperature than 1.

    Both KLs and both entropies are those of the models at temperature 1; a cache of the likeliest
    tokens knows no other temperature than its own. With labels there is no teacher in them.
    """
    known, tokenizer, prompt = scored.known, student.tokenizer, rollout.prompt
    temperature = loss.objective.temperature if isinstance(known, TopK) else 1.0
    stats = _whole_statistics(student, teacher, scored, loss, temperature)
    asked: SamplePrompt = {
        "prompt_id": prompt.example.id,
        "prompt": _text(tokenizer, prompt.token_ids),
    }
    if teacher is not None and prompt.teacher_ids is not None:
        asked["teacher_prompt"] = _text(teacher.tokenizer, prompt.teacher_ids)
    if rollout.credit is not None:
        asked["score"], asked["advantage"] = rollout.credit.score, rollout.credit.advantage
    return {
        **asked,
        "tokens": [token_text(tokenizer, i) for i in rollout.completion_ids],
        "writers": [[writer, len(list(run))] for writer, run in itertools.groupby(rollout.writers)],
        "stop": rollout.stop,
        "trained": list(rollout.trained),
        "temperature": temperature,
        "kept": known.token_ids_NK.shape[1] if isinstance(known, TopK) else None,
        **_numbers(scored.loss_N, stats),
        **_both_choices(student, teacher, scored, loss, temperature),
    }


def _numbers(loss_N: torch.Tensor, stats: TokenStats) -> SampleNumbers:
    """The loss of each token, and those statistics that are known."""
    numbers: SampleNumbers = {"loss": _rounded(loss_N)}
    for name in TOKEN_STATISTICS:
        values_N = getattr(stats, f"{name}_N")
        if values_N is not None:
            numbers[name] = _rounded(values_N)
    return numbers


def _both_choices(
    student: LanguageModel, teacher: Teacher | None, scored: Scored, loss: Loss, temperature: float
) -> SampleChoices:
    """The likeliest tokens of the student, and of the teacher where its distribution is known."""
    known, tokenizer = scored.known, student.tokenizer
    given = {"vocab_size": loss.vocab_size, "temperature": temperature}
    mine = top_k_of(scored.hidden_ND, student.head, NUM_CHOICES, **given)
    choices: SampleChoices = {"student_choices": _choices(mine, (), tokenizer)}
    if isinstance(known, TopK):
        choices["teacher_choices"] = _choices(known, loss.end_class, tokenizer)
    elif isinstance(known, torch.Tensor) and teacher is not None and teacher.head is not None:
        theirs = top_k_of(known, teacher.head, NUM_CHOICES, **given)
        choices["teacher_choices"] = _choices(theirs, (), tokenizer)
    return choices


def _whole_statistics(
    student: LanguageModel, teacher: Teacher | None, scored: Scored, loss: Loss, temperature: float
) -> TokenStats:
    """Statistics of all that is known of both models at a temperature: those of the loss where it
    has taken them."""
    known, hidden_ND = scored.known, scored.hidden_ND
    options: dict[str, Any] = loss.shared_options() | {"temperature": temperature}
    if isinstance(known, TopK):
        if loss.objective.top_k >= known.token_ids_NK.shape[1]:
            return scored.stats
        return top_k_loss(hidden_ND, student.head, known, loss.terms(), **options)[1]
    if isinstance(known, OfWritten):
        return scored.stats
    has_both = known is None or (
        loss.objective.signal != "topk" and scored.stats.forward_kl_N is not None
    )
    if has_both and temperature == loss.objective.temperature:
        return scored.stats
    teacher_head = None if known is None or teacher is None else teacher.head
    return fused_statistics(hidden_ND, student.head, known, teacher_head, **options)


def token_text(tokenizer, token_id: int) -> str:
    """The text that a token writes; its name where it writes nothing, its id where it has no
    name."""
    return (
        _text(tokenizer, [token_id]) or tokenizer.convert_ids_to_tokens(token_id) or f"<{token_id}>"
    )


def _text(tokenizer, ids: Sequence[int]) -> str:
    """Special tokens included, spaces as they are."""
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _choices(kept: TopK, end_class: Sequence[int], tokenizer) -> list[list[Choice]]:
    """The likeliest tokens of each position as [text, probability]; merged end ids are one of
    them."""
    text_of = {
        i: token_text(tokenizer, i) for i in kept.token_ids_NK[:, :NUM_CHOICES].unique().tolist()
    }
    ids_NK, probs_NK = (
        kept.token_ids_NK[:, :NUM_CHOICES].tolist(),
        _rounded(kept.log_probs_NK[:, :NUM_CHOICES].exp()),
    )
    rows = [
        [[text_of[i], p] for i, p in zip(*row, strict=True)]
        for row in zip(ids_NK, probs_NK, strict=True)
    ]
    if kept.end_log_prob_N is not None:
        end_text = " or ".join(token_text(tokenizer, i) for i in end_class)
        for row, p in zip(rows, _rounded(kept.end_log_prob_N.exp()), strict=True):
            row.append([end_text, p])
            row.sort(key=lambda choice: -choice[1])
    return [row[:NUM_CHOICES] for row in rows]


def _rounded(values: torch.Tensor) -> list[Any]:
    """As lists, to LOGGED_DIGITS decimals."""
    return values.double().round(decimals=LOGGED_DIGITS).tolist()
