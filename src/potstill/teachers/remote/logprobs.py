"""A teacher elsewhere that tells log-probabilities alone: those of a prompt's tokens, as vLLM's
server of completions gives them (`prompt_logprobs`).

A request is some rows of token ids. Of each id but the first, the answer has the log-probability at
the position before it, and those of the `top_k` likeliest ids there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.config import TeacherModel
from potstill.kl.topk import TopK
from potstill.models.batch import Batch
from potstill.teachers.ends import describe_ends
from potstill.teachers.protocol import OfWritten
from potstill.teachers.remote.base import (
    CHECKED,
    IdRows,
    RemoteTeacher,
    asked_twice,
    read_by_teacher,
    refuse_disagreement,
)
from potstill.types import ModelError, NonFiniteError, Rollout
from potstill.wire import Answer

PROMPTS = "/v1/completions"
# Nats by which a log-probability may be above 0, and probabilities by which a sum may be above 1.
ABOVE_ZERO, ABOVE_ONE = 1e-4, 1e-3
# Nats by which a server in bfloat16 may differ from itself, and the share of a log-probability, as
# of an unlikely token. Its type is not known.
SELF_ROUNDING, SELF_SHARE = 0.5, 0.05
# A tail of the teacher's that is smaller counts as that, as the student's does.
LEAST_TAIL = torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class Told:
    """Log-probabilities (nats) of a row of T ids but the first, each at the position before it:
    of the ids themselves [T - 1], and of the K likeliest there [T - 1, K], in float64."""

    own_T: Tensor
    top_ids_TK: Tensor
    top_TK: Tensor


class LogProbTeacher(RemoteTeacher):
    """A teacher of which its servers tell the log-probabilities of written tokens, or, where
    `top_k` is above 0, those of the likeliest. It does not write."""

    def __init__(self, spec: TeacherModel, device: torch.device, top_k: int):
        super().__init__(spec, device)
        self.top_k = min(top_k, self.vocab_size)
        self.end_class: tuple[int, ...] = ()
        if self.context_length is not None:
            # A server of completions writes at least one token after a prompt.
            self.context_length -= 1

    def fit(self, vocab_size: int, end_class: tuple[int, ...]) -> None:
        """Take in the rows and the end class that the loss is over. Raises ModelError for what such
        a server does not tell."""
        where = f"the teacher at {', '.join(self.servers.urls)} tells log-probabilities"
        if self.top_k and end_class:
            raise ModelError(
                f"{where}, and those of {describe_ends(self.tokenizer, end_class)}, which are one "
                "class in the loss, only where they are among the likeliest; set "
                'objective.end_class = "raw", or use signal = "sampled" or teacher.protocol = '
                '"states"'
            )
        if self.top_k and vocab_size < self.vocab_size:
            raise ModelError(
                f"{where} of all its {self.vocab_size:,} tokens, and the likeliest may be beyond "
                f'the {vocab_size:,} that the student shares; use signal = "sampled" or '
                'teacher.protocol = "states"'
            )
        self.end_class = end_class

    def rows_of(self, batch: Batch) -> IdRows:
        """All ids of each row, and the same rows up to each loss token of the end class with every
        other member in its place."""
        rows = [read_by_teacher(rollout) for rollout in batch.rollouts]
        others = [
            (*read_by_teacher(rollout)[: place - len(rollout.read_by("teacher")[0])], end_id)
            for rollout in batch.rollouts
            for place, end_ids in self._other_ends(rollout)
            for end_id in end_ids
        ]
        return (*rows, *others)

    def _other_ends(self, rollout: Rollout) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The place in the completion of each loss token of the end class, and the class's other
        members."""
        pairs = zip(*rollout.read_by("teacher"), strict=True)
        for place, (token_id, is_trained) in enumerate(pairs):
            if is_trained and token_id in self.end_class:
                yield place, tuple(each for each in self.end_class if each != token_id)

    def told_of(self, rows: IdRows, first: int = 0) -> list[Told]:
        body = log_probs_request(rows, self.top_k)

        def read(answer: Answer, url: str) -> list[Told]:
            return read_log_probs(answer, rows, self.top_k, self.vocab_size, url)

        return self.servers.ask(PROMPTS, body, read, first=first)

    def signal_at(self, batch: Batch) -> TopK | OfWritten:
        told = self.answers(self.rows_of(batch))
        rows = told[: len(batch.rollouts)]
        if not self.top_k:
            return OfWritten(log_prob_N=self._of_written(batch, rows, told[len(rows) :]))
        parts = [
            _at_loss_tokens(each, rollout, ("top_ids_TK", "top_TK"))
            for rollout, each in zip(batch.rollouts, rows, strict=True)
        ]
        ids, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
        return _top_k(ids.to(self.device), log_probs.to(self.device), self.vocab_size)

    def _of_written(self, batch: Batch, rows: Sequence[Told], others: Sequence[Told]) -> Tensor:
        """The log-probability [N] of each loss token, or of the end class for one in it."""
        parts, left = [], iter(others)
        for rollout, each in zip(batch.rollouts, rows, strict=True):
            is_trained = torch.tensor(rollout.read_by("teacher")[1])
            own_T = each.own_T[-len(is_trained) :].clone()
            for place, end_ids in self._other_ends(rollout):
                ends = [next(left).own_T[-1] for _ in end_ids]
                own_T[place] = torch.stack([own_T[place], *ends]).logsumexp(0)
            parts.append(own_T[is_trained])
        return torch.cat(parts).float().to(self.device)


def _at_loss_tokens(told: Told, rollout: Rollout, names: Sequence[str]) -> list[Tensor]:
    is_trained = torch.tensor(rollout.trained)
    return [getattr(told, name)[-len(is_trained) :][is_trained] for name in names]


def _top_k(ids_NK: Tensor, log_probs_NK: Tensor, vocab_size: int) -> TopK:
    """The likeliest tokens with one class for the rest, which is what they leave of 1."""
    tail_N = None
    if ids_NK.shape[1] < vocab_size:
        rest_N = 1 - log_probs_NK.exp().sum(-1)
        tail_N = rest_N.clamp(min=LEAST_TAIL).log().float()
    return TopK(
        token_ids_NK=ids_NK,
        log_probs_NK=log_probs_NK.float(),
        end_log_prob_N=None,
        tail_log_prob_N=tail_N,
        entropy_N=None,
    )


def log_probs_request(rows: Sequence[Sequence[int]], top_k: int) -> dict[str, Any]:
    """The body of a request for the log-probabilities of some rows of ids, but for the model's
    name. One token is written too, which no server leaves out."""
    return {
        "prompt": [list(row) for row in rows],
        "max_tokens": 1,
        "prompt_logprobs": top_k,
    }


def read_log_probs(
    answer: Answer, rows: Sequence[Sequence[int]], top_k: int, vocab_size: int, url: str
) -> list[Told]:
    """The log-probabilities of each row, on the CPU.

    Raises Unavailable for a cut body, NonFiniteError for numbers that are not finite, and
    ModelError for whatever else is not what was asked for.
    """
    if answer.status != 200:
        limit = f"serve it with --max-logprobs {top_k}, or lower objective.top_k" if top_k else ""
        raise ModelError(
            f"the teacher at {url} refuses {PROMPTS} with prompt_logprobs = {top_k} (status "
            f"{answer.status}): {answer.text}; " + (limit or "start it as docs/teachers.md says")
        )
    found = answer.json()
    try:
        choices = sorted(found["choices"], key=lambda choice: choice["index"])
        told = [choice["prompt_logprobs"] for choice in choices]
    except (KeyError, TypeError):
        raise ModelError(
            f"the teacher at {url} answers {PROMPTS} without prompt_logprobs, as vLLM gives them; "
            "start it as docs/teachers.md says"
        ) from None
    lengths = [len(each) if isinstance(each, list) else None for each in told]
    if lengths != [len(row) for row in rows]:
        raise ModelError(
            f"the teacher at {url} gave log-probabilities of {lengths} ids for rows of "
            f"{[len(row) for row in rows]}; start it as docs/teachers.md says"
        )
    return [
        _row(each, ids, top_k=top_k, vocab_size=vocab_size, url=url)
        for each, ids in zip(told, rows, strict=True)
    ]


def _row(
    found: Sequence[Any], ids: Sequence[int], *, top_k: int, vocab_size: int, url: str
) -> Told:
    own, top_ids, top = [], [], []
    for place in range(1, len(ids)):
        values = _values(found[place], url)
        _check(values, ids, place, top_k=top_k, vocab_size=vocab_size, url=url)
        own.append(values[ids[place]])
        likely = sorted(values, key=values.__getitem__, reverse=True)[:top_k]
        top_ids.append(likely)
        top.append([values[i] for i in likely])
    shape = (len(own), top_k)
    return Told(
        own_T=torch.tensor(own, dtype=torch.float64),
        top_ids_TK=torch.tensor(top_ids, dtype=torch.long).view(shape),
        top_TK=torch.tensor(top, dtype=torch.float64).view(shape),
    )


def _values(found: Any, url: str) -> Mapping[int, float]:
    """The log-probability of each id that is told of a position."""
    try:
        return {int(i): float(each["logprob"]) for i, each in found.items()}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise ModelError(
            f"the teacher at {url} gave {str(found)[:100]} for the log-probabilities of a token; "
            "start it as docs/teachers.md says"
        ) from None


def _check(
    values: Mapping[int, float],
    ids: Sequence[int],
    place: int,
    *,
    top_k: int,
    vocab_size: int,
    url: str,
) -> None:
    """Raise for log-probabilities of a position that are none, or none of this row and this
    teacher."""
    where = f"the teacher at {url} gave, at place {place} of a row,"
    if not all(map(math.isfinite, values.values())):
        raise NonFiniteError(f"{where} log-probabilities that are not finite")
    if ids[place] not in values or len(values) < top_k:
        raise ModelError(
            f"{where} log-probabilities of the ids {sorted(values)[:8]}, and asked for was that of "
            f"{ids[place]} with the {top_k} likeliest; start it as docs/teachers.md says"
        )
    if not 0 <= min(values) <= max(values) < vocab_size:
        raise ModelError(
            f"{where} the ids {min(values)} to {max(values)}, and teacher.model has {vocab_size} "
            "tokens; name the model that the server has"
        )
    highest = max(values.values())
    if highest > ABOVE_ZERO or sum(map(math.exp, values.values())) > 1 + ABOVE_ONE:
        raise ModelError(
            f"{where} numbers of up to {highest:.3g} that are no log-probabilities, as they are "
            "above 0, or their probabilities add up to more than 1; serve it without "
            "--logprobs-mode"
        )


def check_log_probs(teacher: LogProbTeacher) -> None:
    """Raise ModelError for servers that disagree with each other, or with themselves when they are
    asked for the same ids alone and beside others, by more than rounding."""
    alone, found = asked_twice(teacher)
    told = [torch.cat([each.own_T, each.top_TK.flatten()]) for each in (*alone, *found)]
    first = [told[place % len(CHECKED)] for place in range(len(told))]
    gaps = torch.cat([(a - b).abs() for a, b in zip(told, first, strict=True)])
    is_more = gaps > SELF_ROUNDING - SELF_SHARE * torch.cat(first)
    refuse_disagreement(teacher, float((gaps * is_more).max()), SELF_ROUNDING)
