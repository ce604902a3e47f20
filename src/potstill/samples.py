"""A few rollouts for the run log, with the numbers of each loss token and the likeliest tokens of both models."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from potstill.batching import make_batch
from potstill.fused import fused_statistics
from potstill.metrics import TOKEN_STATISTICS
from potstill.models import LanguageModel
from potstill.objective import Loss, Teacher, batch_loss, known_of_teacher, student_rows, teacher_signal
from potstill.topk import TopK, top_k_loss, top_k_of
from potstill.types import Rollout

# Of each model at each loss token, the likeliest first.
NUM_CHOICES = 5
DIGITS = 5


@torch.no_grad()
def logged_samples(
    student: LanguageModel, teacher: Teacher | None, rollouts: Sequence[Rollout], loss: Loss, device: torch.device
) -> list[dict[str, Any]]:
    """Each rollout as plain data; takes a forward pass of each model, so that whole distributions are there to look at.

    `prompt` is the text that the student read (`teacher_prompt` the teacher's, where it is another), `tokens` the
    completion's, `writers` runs of [writer, number of tokens]. One value a loss token, in nats: `loss` is that of
    training, but for the returns of `gamma`; both KLs and both entropies are those of the models at `temperature` 1,
    end ids merged as in the loss. `student_choices` and `teacher_choices` are the likeliest tokens there, each with its
    probability, no ids merged. With labels there is no teacher in them. A cache of the `kept` likeliest tokens knows no
    other temperature than its own, and its KLs are lower bounds. Ranks must call this together.
    """
    batch = make_batch(rollouts, device)
    signal, tokenizer = teacher_signal(teacher, batch, loss), student.tokenizer
    hidden_ND = student_rows(student, batch, loss)
    _, loss_N, stats = batch_loss(student, teacher, signal, batch, loss, hidden_ND=hidden_ND)
    is_whole, known = loss.objective.signal == "full", signal
    if teacher is not None and loss.objective.signal == "topk":
        known = known_of_teacher(teacher, batch)
    options = loss.shared_options()
    if not isinstance(known, TopK):
        options |= {"temperature": 1.0}
    given = {"vocab_size": loss.vocab_size, "temperature": options["temperature"]}
    choices = {"student": _choices(top_k_of(hidden_ND, student.head, NUM_CHOICES, **given), (), tokenizer)}
    if isinstance(known, TopK):
        _, stats = top_k_loss(hidden_ND, student.head, known, loss.terms(), **options)
        choices["teacher"] = _choices(known, loss.end_class, tokenizer)
    elif known is not None and teacher is not None and teacher.head is not None:
        # The loss knows them already where it is of whole distributions at this temperature.
        if not is_whole or options["temperature"] != loss.objective.temperature:
            stats = fused_statistics(hidden_ND, student.head, known, teacher.head, **options)
        choices["teacher"] = _choices(top_k_of(known, teacher.head, NUM_CHOICES, **given), (), tokenizer)
    elif options["temperature"] != loss.objective.temperature:
        stats = fused_statistics(hidden_ND, student.head, **options)
    values = {"loss": loss_N} | {name: getattr(stats, f"{name}_N") for name in TOKEN_STATISTICS}
    numbers = {name: _rounded(value_N) for name, value_N in values.items() if value_N is not None}
    numbers |= {f"{who}_choices": rows for who, rows in choices.items()}
    samples, first = [], 0
    for rollout in rollouts:
        rows = slice(first, first := first + sum(rollout.trained))
        prompt = rollout.prompt
        sample: dict[str, Any] = {"prompt_id": prompt.example.id, "prompt": _text(tokenizer, prompt.token_ids)}
        if teacher is not None and prompt.teacher_ids is not None:
            sample["teacher_prompt"] = _text(teacher.tokenizer, prompt.teacher_ids)
        sample |= {
            "tokens": [token_text(tokenizer, i) for i in rollout.completion_ids],
            "writers": [[writer, len(list(run))] for writer, run in itertools.groupby(rollout.writers)],
            "stop": rollout.stop,
            "trained": list(rollout.trained),
            "temperature": options["temperature"],
            "kept": known.token_ids_NK.shape[1] if isinstance(known, TopK) else None,
        }
        samples.append(sample | {name: values[rows] for name, values in numbers.items()})
    return samples


def token_text(tokenizer, token_id: int) -> str:
    """What a token writes; its name where it writes nothing, its id where it has no name."""
    return _text(tokenizer, [token_id]) or tokenizer.convert_ids_to_tokens(token_id) or f"<{token_id}>"


def _text(tokenizer, ids: Sequence[int]) -> str:
    """Special tokens included, spaces as they are."""
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _choices(kept: TopK, end_class: Sequence[int], tokenizer) -> list[list[list[Any]]]:
    """The likeliest tokens of each position as [text, probability]; merged end ids are one of them."""
    text_of = {i: token_text(tokenizer, i) for i in kept.token_ids_NK[:, :NUM_CHOICES].unique().tolist()}
    ids_NK, probs_NK = kept.token_ids_NK[:, :NUM_CHOICES].tolist(), _rounded(kept.log_probs_NK[:, :NUM_CHOICES].exp())
    rows = [[[text_of[i], p] for i, p in zip(*row, strict=True)] for row in zip(ids_NK, probs_NK, strict=True)]
    if kept.end_log_prob_N is not None:
        end_text = " or ".join(token_text(tokenizer, i) for i in end_class)
        for row, p in zip(rows, _rounded(kept.end_log_prob_N.exp()), strict=True):
            row.append([end_text, p])
            row.sort(key=lambda choice: -choice[1])
    return [row[:NUM_CHOICES] for row in rows]


def _rounded(values: torch.Tensor) -> list[Any]:
    """As lists, to DIGITS decimals."""
    return values.double().round(decimals=DIGITS).tolist()
