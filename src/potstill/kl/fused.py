"""The exact divergence of two language models from hidden states and heads, with no [N, V] tensor
in sight.

The vocabulary is walked in tiles, once for the statistics and once more for the gradient. A budget
of bytes says how many tiles stay in memory between the two; the rest are computed again. Neither
value nor gradient depends on it.

    statistics   m, S and four first moments a token, merged tile by tile, the end class as one more
    column gradient     dz = q (c - h ls + r (ls - lt) + j (ls - lm) - d p / m) - f p for any terms
    (tiles.tile_gradient)

Shapes: N loss tokens, V shared vocabulary, D student hidden, E teacher hidden.
`divergence.token_statistics` is the plain version of all this.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.kl import definition
from potstill.kl.head import Head
from potstill.kl.inputs import Problem
from potstill.kl.terms import LossTerms, TermsFunction, TokenStats, VocabShard, Weight, is_there
from potstill.kl.walk import Gradients, Walk, refuse_rows
from potstill.kl.weights import KnownInputs, asked_mixture, check_terms, check_weight, terms_of_rows

MIB = 2**20
DEFAULT_BUDGET = 256 * MIB


# One argument a part of the problem; a bundle of them would only be taken apart again.
def fused_loss(  # noqa: PLR0913
    hidden_ND: Tensor,
    head: Head,
    teacher_hidden_NE: Tensor | None,
    teacher_head: Head | None,
    terms: LossTerms | TermsFunction,
    *,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    end_ids: Sequence[int] = (),
    mixture_weight: float | None = None,
    together: bool = False,
    budget: int = DEFAULT_BUDGET,
    backend: str = "auto",
    tile: tuple[int, int] | None = None,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, TokenStats]:
    """The training loss `scale * sum_i weights_i loss_i`; its gradient is taken on the way forward.

    Returns `(loss_sum, loss_N, stats)`: a scalar with a gradient for the student's hidden states,
    head weight and bias (those that require one); the loss of each token before weights and scale;
    and detached statistics [N] in nats.

    `terms` may be a `TermsFunction`, called between the passes for each group of rows that the
    budget makes. It must treat each row by itself, so that the budget changes no result; or it is
    called once with all of them `together`, and tiles beyond the budget are computed twice. It
    knows the divergences from a mixture where `mixture_weight` asks for them, at one pass more.

    Without a teacher (`teacher_hidden_NE` and `teacher_head` None) only entropy and cross-entropy
    can be asked for. `labels_N` holds the written tokens; cross-entropy and the log-probabilities
    in the statistics need it. `vocab_size` cuts both heads to their shared rows. `temperature`
    divides both models' logits; statistics are those of the tempered distributions. Two or more
    `end_ids` are one class on both sides. Arithmetic is in float32 (float64 for float64 hidden
    states). `budget` is the memory in bytes for tiles that stay between the passes; 0 computes all
    twice. `backend` is "eager", "compiled", "triton", "plain" (whole logits and autograd) or "auto"
    (Triton on GPUs, eager elsewhere). `tile` fixes a tile's (rows, columns).

    Where there is a gradient the value is in the Bregman form: a KL of 2e-6 nats is right to 1 %.
    Raises ValueError for what does not fit, NonFiniteError for logits that are NaN or infinite.
    """
    sides = (hidden_ND, head, teacher_hidden_NE, teacher_head)
    mixture_weight = asked_mixture(terms, mixture_weight)
    problem = Problem(
        *sides, labels_N, vocab_size, temperature, tuple(end_ids), mixture_weight, shard
    )
    _check_weights(terms, weights_N, scale, problem)
    if backend == "plain":
        stats = _plain_statistics(problem, sides, labels_N, end_ids, temperature)
        rows = slice(0, problem.num_rows)
        loss_N = token_loss(terms_of_rows(terms, detached(stats), rows, mixture_weight), stats)
        return _weighted_sum(loss_N, weights_N, scale), loss_N.detach(), detached(stats)
    inputs, is_on = (hidden_ND, head.weight_VD, head.bias_V), torch.is_grad_enabled()
    trained = tuple(is_on and t is not None and t.requires_grad for t in inputs)
    kept = budget if any(trained) else 0
    walk = Walk(problem, kept, backend, tile, trains_head=trained[1], together=together)
    loss_sum, loss_N, *values = _Loss.apply(*inputs, terms, weights_N, scale, walk, trained)  # pyright: ignore
    return loss_sum, loss_N, _from_values(values)


def _check_weights(
    terms: LossTerms | TermsFunction, weights_N: Tensor | None, scale: float, problem: Problem
) -> None:
    has_teacher, has_labels = problem.teacher is not None, problem.labels is not None
    check_terms(
        terms, KnownInputs(has_teacher, has_labels, problem.mixture_weight), problem.num_rows
    )
    check_weight("scale", scale, problem.num_rows)
    if weights_N is not None:
        check_weight("weights_N", weights_N, problem.num_rows)


# The arguments of fused_loss that concern no gradient.
def fused_statistics(  # noqa: PLR0913
    hidden_ND: Tensor,
    head: Head,
    teacher_hidden_NE: Tensor | None = None,
    teacher_head: Head | None = None,
    *,
    labels_N: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    end_ids: Sequence[int] = (),
    mixture_weight: float | None = None,
    backend: str = "auto",
    tile: tuple[int, int] | None = None,
    shard: VocabShard | None = None,
) -> TokenStats:
    """All statistics [N] in nats, differentiable in the student: its KLs, entropy, log-probs,
    log-sum-exps and JSD.

    The gradient pass runs in `backward`, for whatever gradients arrive there, and computes every
    tile again. Values come from the statistics pass alone: a KL carries an absolute error of about
    2e-6 nats in float32. `mixture_weight` asks for the JSD and both skew KLs, which take one more
    pass. Arguments and errors are those of `fused_loss`.
    """
    sides = (hidden_ND, head, teacher_hidden_NE, teacher_head)
    problem = Problem(
        *sides, labels_N, vocab_size, temperature, tuple(end_ids), mixture_weight, shard
    )
    if backend == "plain":
        return _plain_statistics(problem, sides, labels_N, end_ids, temperature)
    walk = Walk(problem, 0, backend, tile, trains_head=True)
    return _from_values(_Statistics.apply(hidden_ND, head.weight_VD, head.bias_V, walk))  # pyright: ignore


@torch.no_grad()
def close_kl(
    hidden_ND: Tensor,
    head: Head,
    teacher_hidden_NE: Tensor,
    teacher_head: Head,
    *,
    labels_N: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    end_ids: Sequence[int] = (),
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, TokenStats]:
    """KL(teacher || student) [N] of models that nearly agree, in float64 and never negative; and
    all statistics.

    The KL of `fused_statistics` is right to 2e-6 nats, of either sign; this one takes a pass more
    and is right to 1e-10 or better. Arguments and errors are those of `fused_statistics`.
    """
    sides = (hidden_ND, head, teacher_hidden_NE, teacher_head)
    problem = Problem(*sides, labels_N, vocab_size, temperature, tuple(end_ids), None, None)
    walk = Walk(problem, DEFAULT_BUDGET, "auto", tile, trains_head=False)
    parts, kls = [], [torch.zeros(0, dtype=torch.float64, device=problem.device)]
    for group in walk.groups():
        found = walk.statistics(group)
        parts.append(found.stats(problem))
        kls.append(walk.forward_kl(found))
    return torch.cat(kls), _joined(parts, problem)


class _Loss(torch.autograd.Function):
    """The scalar loss, whose gradient is known when its value is."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, terms, weights_N, scale, walk, trained):  # pyright: ignore[reportIncompatibleMethodOverride]
        problem: Problem = walk.problem
        into = Gradients(walk, hidden, weight, bias, trained)
        parts, losses = [], [hidden.new_zeros(0, dtype=problem.dtype)]
        with torch.autocast(hidden.device.type, enabled=False):
            for group in walk.groups():
                found, kl_N = walk.statistics(group), None
                stats, rows = found.stats(problem), slice(group.start, group.stop)
                given = terms_of_rows(terms, stats, rows, problem.mixture_weight)
                if any(trained):
                    kl_N = walk.gradient(found, given, 0.0, weights_N, scale, into)
                parts.append(stats)
                losses.append(token_loss(given, stats, kl_N))
            stats, loss_N = _joined(parts, problem), torch.cat(losses)
            ctx.gradients = into.finish(
                problem, [None if t is None else t.dtype for t in (hidden, weight, bias)]
            )
        loss_sum = _weighted_sum(loss_N, weights_N, scale)
        values = _to_values(stats)
        ctx.mark_non_differentiable(loss_N, *(t for t in values if t is not None))
        ctx.set_materialize_grads(False)
        return loss_sum, loss_N, *values

    @staticmethod
    def backward(ctx, upstream, *unused):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of fused_loss was used already; call fused_loss again for a second "
                "backward"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if upstream is None:
            return (None,) * 8
        # On a CPU a look is cheaper than a multiplication of [V, D] by one.
        if upstream.is_cuda or upstream.item() != 1:
            gradients = [None if g is None else g.mul_(upstream) for g in gradients]
        return (*gradients, None, None, None, None, None)


class _Statistics(torch.autograd.Function):
    """Statistics per token; the gradient pass waits for the gradients of those that are used."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, walk):  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(hidden.device.type, enabled=False):
            ctx.found = [walk.statistics(group) for group in walk.groups()]
            stats = _joined([found.stats(walk.problem) for found in ctx.found], walk.problem)
        ctx.walk = walk
        ctx.save_for_backward(hidden, weight, bias)
        constant = (stats.teacher_entropy_N, stats.teacher_log_sum_exp_N, stats.teacher_log_prob_N)
        ctx.mark_non_differentiable(*(value for value in constant if value is not None))
        ctx.set_materialize_grads(False)
        return _to_values(stats)

    @staticmethod
    def backward(ctx, *upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        walk, (hidden, weight, bias) = ctx.walk, ctx.saved_tensors
        into = Gradients(walk, hidden, weight, bias, ctx.needs_input_grad[:3])
        problem = walk.problem
        gradients = _from_values(upstream)
        terms = LossTerms(
            forward=_weight(gradients.forward_kl_N),
            reverse=_weight(gradients.reverse_kl_N),
            jsd=_weight(gradients.jsd_N),
            entropy=_weight(gradients.student_entropy_N),
            cross_entropy=-_weight(gradients.student_log_prob_N),
            skew_forward=_weight(gradients.skew_forward_N),
            skew_reverse=_weight(gradients.skew_reverse_N),
            mixture_weight=problem.mixture_weight or 0.5,
        )
        log_sum_exp = _weight(gradients.student_log_sum_exp_N)
        with torch.autocast(hidden.device.type, enabled=False):
            # Without a budget all rows are one group, so that the weights are those of its rows.
            for found in ctx.found:
                walk.gradient(found, terms, log_sum_exp, None, 1.0, into)
            return *into.finish(
                problem, [None if t is None else t.dtype for t in (hidden, weight, bias)]
            ), None


def _weight(gradient_N: Tensor | None) -> Weight:
    """The weight of a term in the loss from the gradient of its statistic, None where that is not
    used."""
    return 0.0 if gradient_N is None else gradient_N


def _plain_statistics(
    problem: Problem,
    sides: tuple[Tensor, Head, Tensor | None, Head | None],
    labels_N: Tensor | None,
    end_ids: Sequence[int],
    temperature: float,
) -> TokenStats:
    """By the definitions, from whole logits and with autograd's own graph."""
    if problem.shard is not None:
        raise ValueError(
            "the plain backend needs the whole vocabulary on each rank; choose another backend"
        )
    hidden_ND, head, teacher_hidden_NE, teacher_head = sides
    student_NV, teacher_NV = head(hidden_ND, problem.vocab_size), None
    if teacher_hidden_NE is not None and teacher_head is not None:
        with torch.no_grad():
            teacher_NV = teacher_head(teacher_hidden_NE, problem.vocab_size)
    student = "model" if teacher_NV is None else "student"
    for who, logits_NV in ((student, student_NV), ("teacher", teacher_NV)):
        if logits_NV is not None:
            merged_NV = definition.merge_end_class(logits_NV.detach(), end_ids)
            refuse_rows(~torch.isfinite(merged_NV).all(-1), who)
    return definition.token_statistics(
        student_NV,
        teacher_NV,
        labels_N=labels_N,
        temperature=temperature,
        end_ids=end_ids,
        mixture_weight=problem.mixture_weight,
    )


def token_loss(terms: LossTerms, stats: TokenStats, kl_N: Tensor | None = None) -> Tensor:
    """The loss of each token from its statistics; `kl_N` is a better value of the two KL terms."""
    parts = [] if kl_N is None else [kl_N]
    weighted = [
        (terms.jsd, stats.jsd_N),
        (terms.skew_forward, stats.skew_forward_N),
        (terms.skew_reverse, stats.skew_reverse_N),
        (terms.entropy, stats.student_entropy_N),
    ]
    if kl_N is None:
        weighted += [(terms.forward, stats.forward_kl_N), (terms.reverse, stats.reverse_kl_N)]
    parts += [
        weight * value_N for weight, value_N in weighted if is_there(weight) and value_N is not None
    ]
    if is_there(terms.cross_entropy) and stats.student_log_prob_N is not None:
        parts.append(-terms.cross_entropy * stats.student_log_prob_N)
    # Without any term it is still a function of the student. One after the other, because the order
    # in which `Tensor.sum` adds depends on how many rows there are.
    return functools.reduce(torch.add, parts or [0 * stats.student_entropy_N])


def _weighted_sum(loss_N: Tensor, weights_N: Tensor | None, scale: float) -> Tensor:
    return scale * (loss_N if weights_N is None else loss_N * weights_N).sum()


def _joined(parts: Sequence[TokenStats], problem: Problem) -> TokenStats:
    """The statistics of all groups, one after the other."""
    if not parts:
        return _empty(problem)
    columns = zip(*map(_to_values, parts), strict=True)
    return _from_values([None if column[0] is None else torch.cat(column) for column in columns])


def _empty(problem: Problem) -> TokenStats:
    """The statistics of no token at all."""

    def empty(is_there: bool = True) -> Any:
        return torch.zeros(0, dtype=problem.dtype, device=problem.device) if is_there else None

    has_teacher, has_labels = problem.teacher is not None, problem.labels is not None
    has_mixture = problem.mixture_weight is not None
    return TokenStats(
        student_entropy_N=empty(),
        student_log_sum_exp_N=empty(),
        forward_kl_N=empty(has_teacher),
        reverse_kl_N=empty(has_teacher),
        jsd_N=empty(has_mixture),
        teacher_entropy_N=empty(has_teacher),
        teacher_log_sum_exp_N=empty(has_teacher),
        student_log_prob_N=empty(has_labels),
        teacher_log_prob_N=empty(has_labels and has_teacher),
        skew_forward_N=empty(has_mixture),
        skew_reverse_N=empty(has_mixture),
    )


def _to_values(stats: TokenStats) -> tuple[Tensor | None, ...]:
    """The statistics as an autograd function returns them: a tuple, in the order of the class."""
    return tuple(getattr(stats, name) for name in TokenStats.__slots__)


def _from_values(values: Iterable[Any]) -> TokenStats:
    """The inverse of `_to_values`; values that belong to the statistics, such as their gradients,
    go by their names."""
    return TokenStats(**dict(zip(TokenStats.__slots__, values, strict=True)))


def detached(stats: TokenStats) -> TokenStats:
    """The same numbers without a gradient."""
    return _from_values(None if value is None else value.detach() for value in _to_values(stats))
