"""Batch to loss: hidden states of both models at the loss tokens, both heads, the divergence and
the reward, and their statistics.

Losses are sums. The one divisor, a count over the whole optimiser step, comes from the training
loop.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from potstill.config import Objective, Reward
from potstill.engines.mismatch import importance_ratio
from potstill.kl.fused import DEFAULT_BUDGET, fused_loss, fused_statistics
from potstill.kl.head_share import head_share
from potstill.kl.terms import LossTerms, TermsFunction, TokenStats
from potstill.kl.topk import TopK, top_k_loss, top_k_of
from potstill.models import distributed
from potstill.models.batch import Batch
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel
from potstill.objectives.estimators import estimate, log_ratio, token_slope
from potstill.objectives.reward import policy_gradient
from potstill.objectives.span_loss import SpanSignal, own_log_probs, span_loss, span_signal
from potstill.objectives.tokens import KnownBefore, known_before, positions
from potstill.objectives.weightings import TokenWeighting, make_weighting, weighs_together
from potstill.rollouts.spans import Translation
from potstill.teachers.protocol import OfWritten, Teacher
from potstill.types import Rollout

# All forms of what a teacher tells of its loss tokens, and of what the loss takes of that.
Heard = Tensor | TopK | OfWritten
Signal = Heard | SpanSignal


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a run, fixed before the first step but for `forward_weight`, which a schedule may
    change.

    `vocab_size` is the number of rows both heads share. `end_class` holds the ids that count as one
    class in the divergence (`ends.find_ends`). `budget` (bytes) and `backend` are those of
    `fused_loss` and change no result. `importance_cap` is the engine's. `teacher_weight` is that of
    the teacher's divergence, beside those of other teachers. `translation` is there for
    `signal = "spans"`.
    """

    objective: Objective
    normalize: str
    reward: Reward = field(default_factory=Reward)
    compute_dtype: str = "float32"
    vocab_size: int | None = None
    end_class: tuple[int, ...] = ()
    budget: int = DEFAULT_BUDGET
    backend: str = "auto"
    forward_weight: float | None = None
    importance_cap: float | None = None
    teacher_weight: float = 1.0
    translation: Translation | None = None

    def divisor(self, rollouts: list[Rollout]) -> int:
        """This rank's part of the step's one divisor: its loss tokens, or its sequences that have
        any."""
        counts = [sum(rollout.trained) for rollout in rollouts]
        return sum(counts) if self.normalize == "token" else sum(count > 0 for count in counts)

    def shared_options(self) -> dict[str, Any]:
        """Arguments of every call of the fused divergence."""
        return {
            "vocab_size": self.vocab_size,
            "temperature": self.objective.temperature,
            "end_ids": self.end_class,
            "backend": self.backend,
        }

    def terms(self) -> LossTerms:
        """The weight of each term in a token's loss, before what single tokens count for."""
        return self._of_one_teacher().scaled(self.teacher_weight)

    def _of_one_teacher(self) -> LossTerms:
        objective = self.objective
        if objective.signal == "labels":
            return LossTerms(cross_entropy=1.0)
        if objective.kl == "none" or objective.signal in ("sampled", "spans"):
            return LossTerms()
        if objective.kl == "jsd":
            return LossTerms(jsd=1.0, mixture_weight=objective.jsd_weight)
        if objective.kl == "skew-forward":
            return LossTerms(skew_forward=1.0, mixture_weight=objective.skew)
        if objective.kl == "skew-reverse":
            return LossTerms(skew_reverse=1.0, mixture_weight=1 - objective.skew)
        mixed = objective.forward_weight if self.forward_weight is None else self.forward_weight
        weight = {"forward": 1.0, "reverse": 0.0, "mixed": mixed}[objective.kl]
        return LossTerms(forward=weight, reverse=1 - weight)

    @functools.cached_property
    def weighting(self) -> TokenWeighting | None:
        """The function that says what each token counts for; None where all count alike.

        Raises DataError for one of the user's own that is not there.
        """
        return make_weighting(self.objective)

    @property
    def mixture_weight(self) -> float | None:
        """The teacher's weight in the mixture that a divergence is from; None where none is."""
        terms = self.terms()
        return terms.mixture_weight if terms.has_mixture else None

    @property
    def has_one_weight(self) -> bool:
        """Whether every token has the same terms."""
        is_estimated = self.objective.signal == "sampled"
        return self.weighting is None and not self.reward.weight and not is_estimated

    def terms_at(self, known: KnownBefore, stats: TokenStats) -> LossTerms:
        """The terms of some tokens, by all that is known of each; constants of the gradient."""
        terms = self.terms()
        if self.objective.signal == "sampled":
            terms = replace(terms, cross_entropy=-token_slope(stats, self.objective))
        tokens = known.tokens(terms, stats)
        if self.weighting is not None:
            terms = self.weighting(tokens)
        if self.reward.weight:
            reward_N = policy_gradient(tokens, self.reward)
            terms = replace(terms, cross_entropy=terms.cross_entropy + reward_N)
        if known.return_N is not None:
            terms = replace(terms, cross_entropy=terms.cross_entropy - known.return_N)
        if self.importance_cap is not None and known.engine_log_prob_N is not None:
            assert tokens.sampling_log_prob_N is not None
            told_N, ours_N = known.engine_log_prob_N, tokens.sampling_log_prob_N
            weight_N = importance_ratio(told_N, ours_N, self.importance_cap)
            terms = replace(terms, cross_entropy=terms.cross_entropy * weight_N)
        return terms


@torch.no_grad()
def known_of_teacher(teacher: Teacher | None, batch: Batch, loss: Loss) -> Heard | None:
    """All that is known of the teacher at a batch's N loss tokens: hidden states [N, E], or what a
    cache keeps or a server tells; None where there is no divergence from it.
    """
    if not loss.objective.has_divergence:
        return None
    assert teacher is not None, "prepare loads a teacher for every divergence"
    return teacher.signal_at(batch)


@torch.no_grad()
def teacher_signal(teacher: Teacher | None, batch: Batch, loss: Loss) -> Signal | None:
    """The teacher's signal at a batch's N loss tokens: hidden states [N, E], live or from the
    cache, for `signal = "topk"` its likeliest tokens, or how likely the written ones are, or the
    spans that they are in; None where there is no divergence from it.
    """
    return signal_of(known_of_teacher(teacher, batch, loss), teacher, batch, loss)


@torch.no_grad()
def signal_of(
    known: Heard | None, teacher: Teacher | None, batch: Batch, loss: Loss
) -> Signal | None:
    """The part of `known_of_teacher` that the loss takes: all of it, for `signal = "topk"` the
    likeliest tokens, or for "spans" the log-probabilities of spans."""
    if loss.translation is not None:
        return span_signal(_own_log_probs(known, teacher, batch, loss), batch)
    if known is None or loss.objective.signal != "topk":
        return known
    if isinstance(known, TopK):
        return known.cut(loss.objective.top_k)
    assert isinstance(known, Tensor), "who tells less is asked for the likeliest tokens"
    assert teacher is not None and teacher.head is not None, "a cache of hidden states has the head"
    options = loss.shared_options()
    given = {name: options[name] for name in ("vocab_size", "temperature", "end_ids")}
    return top_k_of(known, teacher.head, loss.objective.top_k, **given)


def _own_log_probs(
    known: Heard | None, teacher: Teacher | None, batch: Batch, loss: Loss
) -> Tensor:
    """The log-probabilities of a teacher with another tokenizer, of its own loss tokens."""
    if isinstance(known, OfWritten):
        return known.log_prob_N
    assert isinstance(known, Tensor) and teacher is not None and teacher.head is not None, (
        "the recipe asks for a teacher that is no cache"
    )
    assert loss.translation is not None
    spelling, options = loss.translation.teacher, loss.shared_options()
    return own_log_probs(known, teacher.head, batch, spelling, options=options)


def batch_loss(
    student: LanguageModel,
    teacher: Teacher | None,
    signal: Signal | None,
    batch: Batch,
    loss: Loss,
    divisor: float = 1.0,
    return_N: Tensor | None = None,
    hidden_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor, TokenStats]:
    """The weighted sum of the loss over the N loss tokens of a batch, over `divisor`; the loss of
    each; statistics.

    Returns `(loss_sum, loss_N, stats)`; only the first carries a gradient. `signal` is what
    `teacher_signal` gives; it is None for hard labels, whose loss is the cross-entropy of the
    written token, and where the reward is alone. `return_N` is what each written token answers for
    beside its own KL: as a constant, times the token's log-probability, it is added to the loss.
    `hidden_ND` is what `student_rows` gives, where the caller has it already. Raises NonFiniteError
    for logits that are not finite.
    """
    hidden_ND = student_rows(student, batch, loss) if hidden_ND is None else hidden_ND
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    weights_N = token_weights(batch, loss, dtype)
    if isinstance(signal, SpanSignal):
        return span_loss(
            hidden_ND,
            student.head,
            signal,
            batch.target_ids_BT[batch.loss_mask_BT],
            loss.objective.estimator,
            weights_N=weights_N,
            scale=1 / divisor,
            options=loss.shared_options() | {"budget": loss.budget},
        )
    has_one_weight = loss.has_one_weight and return_N is None
    terms = loss.terms()
    if not has_one_weight:
        known = known_before(batch, dtype, return_N, loss.end_class)
        if loss.objective.weights == "akl":
            share_N = _head_share(student, teacher, hidden_ND, signal, loss)
            known = replace(known, head_share_N=share_N)
        terms = token_terms(known, loss)
    if isinstance(signal, TopK):
        options, mixture_weight = loss.shared_options(), loss.mixture_weight
        loss_N, stats = top_k_loss(
            hidden_ND, student.head, signal, terms, mixture_weight=mixture_weight, **options
        )
        return _weighted_sum(loss_N, weights_N, divisor), loss_N.detach(), stats
    states_NE = signal if isinstance(signal, Tensor) else None
    if isinstance(signal, OfWritten):
        terms = _knowing(terms, signal)
    # Log-probabilities of the written tokens cost a gather of head rows; few losses read them.
    is_told = batch.rollouts[0].engine_log_probs is not None
    reads_labels = loss.objective.signal == "labels" or not has_one_weight or is_told
    loss_sum, loss_N, stats = fused_loss(
        hidden_ND,
        student.head,
        states_NE,
        None if states_NE is None or teacher is None else teacher.head,
        terms,
        labels_N=batch.target_ids_BT[batch.loss_mask_BT] if reads_labels else None,
        weights_N=weights_N,
        scale=1 / divisor,
        budget=loss.budget,
        mixture_weight=loss.mixture_weight,
        together=weighs_together(loss.objective),
        **loss.shared_options(),
    )
    if isinstance(signal, OfWritten):
        stats = replace(stats, teacher_log_prob_N=signal.log_prob_N)
    if loss.objective.signal == "sampled":
        # The estimate has another value than what is differentiated.
        loss_N = estimate(log_ratio(stats), loss.objective.estimator)
        value = _weighted_sum(loss_N, weights_N, divisor)
        loss_sum = loss_sum + (value - loss_sum.detach())
    return loss_sum, loss_N, stats


def _knowing(terms: LossTerms | TermsFunction, signal: OfWritten) -> TermsFunction:
    """The terms of tokens of which the teacher's log-probability is known beside what the first
    pass finds."""
    assert not isinstance(terms, LossTerms), "an estimate has a weight of its own for each token"

    def of_rows(stats: TokenStats, rows: slice) -> LossTerms:
        return terms(replace(stats, teacher_log_prob_N=signal.log_prob_N[rows]), rows)

    return of_rows


def token_terms(known: KnownBefore, loss: Loss) -> TermsFunction:
    """The function that the loss asks for terms between its two passes."""

    def terms(stats: TokenStats, rows: slice) -> LossTerms:
        return loss.terms_at(known.at(rows), stats)

    return terms


def _head_share(
    student: LanguageModel,
    teacher: Teacher | None,
    hidden_ND: Tensor,
    signal: Signal | None,
    loss: Loss,
) -> Tensor:
    """The share [N] of both models' difference that is on the teacher's head."""
    assert isinstance(signal, Tensor) and teacher is not None and teacher.head is not None, (
        "the recipe asks for a teacher's whole signal"
    )
    options = loss.shared_options()
    given = {name: options[name] for name in ("vocab_size", "temperature", "end_ids")}
    mass = loss.objective.weighting_arguments["mass"]
    pair = (hidden_ND.detach(), student.head), (signal, teacher.head)
    return head_share(*pair, mass, budget=loss.budget, **given)


def student_rows(student: LanguageModel, batch: Batch, loss: Loss) -> Tensor:
    """The student's hidden states [N, D] at a batch's loss tokens."""
    # Only the backbone computes in the lower type: bfloat16 logits would bias the gradient and the
    # entropy.
    with torch.autocast(
        batch.input_ids_BT.device.type, torch.bfloat16, enabled=loss.compute_dtype == "bfloat16"
    ):
        return student(*batch.student_inputs)[batch.loss_mask_BT]


def _weighted_sum(loss_N: Tensor, weights_N: Tensor | None, divisor: float) -> Tensor:
    return (loss_N if weights_N is None else loss_N * weights_N).sum() / divisor


def token_weights(batch: Batch, loss: Loss, dtype: torch.dtype) -> Tensor | None:
    """The weight of each loss token [N] by which sequences count alike; None where tokens do."""
    if loss.normalize == "token":
        return None
    counts = torch.tensor([sum(each.trained) for each in batch.rollouts])
    return 1 / counts.repeat_interleave(counts).to(batch.loss_mask_BT.device, dtype)


@torch.no_grad()
def later_costs(
    student: LanguageModel, teacher: Teacher | None, batch: Batch, loss: Loss
) -> Tensor:
    """The return [N] of each loss token of a batch (nats); takes a forward pass of both models."""
    hidden_ND = student_rows(student, batch, loss)
    signal = teacher_signal(teacher, batch, loss)
    assert isinstance(signal, Tensor) and teacher is not None, (
        "the recipe asks for a teacher's whole signal"
    )
    stats = fused_statistics(hidden_ND, student.head, signal, teacher.head, **loss.shared_options())
    assert stats.reverse_kl_N is not None
    return returns_to_go(stats.reverse_kl_N, batch, loss.objective.gamma)


def without_baseline(
    returns: Sequence[Tensor], batches: Sequence[Batch], world: World
) -> list[Tensor]:
    """Each return minus the mean of the other rollouts' at its position, over all batches of a step
    and all ranks.

    The others know nothing of the token that was drawn, so no expectation changes; where no other
    rollout came as far there is nothing to subtract.
    """
    places = [positions(batch) for batch in batches]
    length = distributed.max_over_ranks(max(int(each.max()) for each in places) + 1, world)
    sums_2L = torch.zeros(2, length, dtype=torch.float64)
    for returns_N, places_N in zip(returns, places, strict=True):
        ones_N = torch.ones_like(returns_N, dtype=torch.float64)
        sums_2L.index_add_(1, places_N.cpu(), torch.stack([returns_N.double(), ones_N]).cpu())
    total_L, count_L = torch.tensor(
        distributed.sum_over_ranks(sums_2L.flatten().tolist(), world)
    ).view(2, length)
    centred = []
    for returns_N, places_N in zip(returns, places, strict=True):
        others_N, sum_N = (
            count_L[places_N.cpu()] - 1,
            total_L[places_N.cpu()] - returns_N.double().cpu(),
        )
        mean_N = torch.where(others_N > 0, sum_N / others_N.clamp(min=1), 0.0)
        centred.append(returns_N - mean_N.to(returns_N))
    return centred


def returns_to_go(kl_N: Tensor, batch: Batch, gamma: float) -> Tensor:
    """The discounted KL of the later tokens of each token's rollout [N]: sum over u > t of gamma^(u
    - t) KL_u, in nats.

    KL_u is the exact reverse KL at position u, the mean of the log-ratio that a policy gradient
    would take there (docs/theory.md, section 3). With gamma = 1, the local gradient plus that of
    sum_t returns_t log q(y_t) is the gradient of the sequence's reverse KL.
    """
    lengths = [len(rollout.completion_ids) for rollout in batch.rollouts]
    is_there_BL = (
        torch.arange(max(lengths), device=kl_N.device)
        < torch.tensor(lengths, device=kl_N.device)[:, None]
    )
    costs_BL = kl_N.new_zeros(is_there_BL.shape)
    costs_BL[is_there_BL] = kl_N
    returns_BL = torch.zeros_like(costs_BL)
    for t in range(costs_BL.shape[1] - 2, -1, -1):
        returns_BL[:, t] = gamma * (costs_BL[:, t + 1] + returns_BL[:, t + 1])
    return returns_BL[is_there_BL]
