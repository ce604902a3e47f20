"""Identities checked on a model of a user."""

import dataclasses

import torch

from potstill.kl.definition import DIVERGENCES
from potstill.kl.fused import fused_loss
from potstill.models.language_model import LanguageModel
from potstill.models.probe import logits_error
from potstill.theory.check import Check
from potstill.theory.divergences import definition, plain_terms
from potstill.theory.enumeration import apart, relative


def check_model(model: LanguageModel, num_tokens: int = 8, max_rows: int = 16_384) -> list[Check]:
    """The checks that need no enumeration, on a real model's head and hidden states, in float64.

    The student's rows are those of some tokens, the teacher's those of the tokens before. At most
    `max_rows` rows of the vocabulary are looked at.
    """
    size = min(model.vocab_size, max_rows)
    ids = torch.arange(num_tokens + 1, device=model.device)[None] * (
        model.vocab_size // (num_tokens + 1)
    )
    with torch.no_grad():
        hidden = model(ids)[0].double()
    cut = model.head
    head = dataclasses.replace(
        cut,
        weight_VD=cut.weight_VD[:size].detach().double(),
        bias_V=None if cut.bias_V is None else cut.bias_V[:size].detach().double(),
    )
    student, teacher = hidden[1:].clone().requires_grad_(), hidden[:-1]
    name = "hidden states times head = the model's own logits, in its own type"
    error, bound = logits_error(model)
    checks = [Check(name=name, error=error, bound=bound)]
    found = {}
    for kind in DIVERGENCES:
        exact = definition(kind, head(student), head(teacher), 0.3)
        (gradient,) = torch.autograd.grad(exact.sum(), student)
        loss_sum, loss_N, _ = fused_loss(student, head, teacher, head, plain_terms(kind, 0.3))
        (fused,) = torch.autograd.grad(loss_sum, student)
        scale = float(gradient.abs().max().clamp(min=1e-30))
        found[kind] = fused
        error = max(apart(loss_N, exact.detach()), apart(fused, gradient) / scale)
        name = f"{kind}: value and gradient by definition (fused), {num_tokens} tokens, "
        name += f"{size:,} of {model.vocab_size:,} rows"
        checks.append(Check(name=name, error=error))

    log_q, log_p = head(student).log_softmax(-1), head(teacher).log_softmax(-1).detach()
    (soft,) = torch.autograd.grad(-(log_p.exp() * log_q).sum(), student, retain_graph=True)
    checks.append(
        Check(
            name="forward-KL gradient = soft cross-entropy gradient",
            error=relative(found["forward"], soft),
        )
    )
    surrogate = -(log_q.detach().exp() * (log_p - log_q.detach()) * log_q).sum()
    (policy,) = torch.autograd.grad(surrogate, student)
    name = "reverse-KL gradient = policy gradient with reward log p - log q"
    checks.append(Check(name=name, error=relative(found["reverse"], policy)))
    mixed = 0.3 * found["forward"] + 0.7 * found["reverse"]
    return [
        *checks,
        Check(
            name="mixed gradient = w forward + (1 - w) reverse",
            error=relative(found["mixed"], mixed),
        ),
    ]
