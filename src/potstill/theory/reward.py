"""Identities of the policy gradient: groups of responses, the clipped surrogate, reward with a KL.

As in `identities`, models are tables and every text is listed, here once as tensors. One side is
the fused pass of training, where a reward is a weight on the log-probability of each written token.
The other side is a central difference of the objective, or autograd of its definition.

Shapes: Y texts, M tokens of all texts, S prefixes, V vocabulary, K groups of G texts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.config import Reward
from potstill.kl.fused import fused_loss, fused_statistics
from potstill.kl.terms import LossTerms
from potstill.objectives.reward import LEAST_DEVIATION, credits_of, surrogate_weight
from potstill.theory.check import DISTANCE, Check
from potstill.theory.enumeration import Table, all_texts, apart, differences

# How far the clipped ratio of a token may go, and how far the writer is from the student.
LOW, HIGH, DRIFT = 0.2, 0.28, 0.7
# The weight of the KL to the start model.
START_KL = 0.5
# Each step halves the distance to the optimum: 2^-50 is below rounding.
NUM_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class ScoredTexts:
    """Every text with its score and length, token by token: the row of each token's prefix, the
    token, and which text it is in."""

    row_M: Tensor
    id_M: Tensor
    text_M: Tensor
    length_Y: Tensor
    score_Y: Tensor

    def token_log_probs(self, model: Table) -> Tensor:
        """The log-probability of each token [M]."""
        return model.logits_SV.log_softmax(-1)[self.row_M, self.id_M]

    def log_probs(self, model: Table) -> Tensor:
        """The log-probability of each text [Y]."""
        token_M = self.token_log_probs(model)
        return token_M.new_zeros(len(self.length_Y)).index_add(0, self.text_M, token_M)

    def probs(self, model: Table) -> Tensor:
        """The probability of each text [Y], as a constant."""
        return self.log_probs(model).detach().exp()

    def mean_score(self, model: Table) -> Tensor:
        """The mean score of a model's texts."""
        return (self.log_probs(model).exp() * self.score_Y).sum()

    def sums(self, values_Y: Tensor, like_SV: Tensor) -> Tensor:
        """The sum [S, V] of a value over the texts that write each token after each prefix."""
        sums_SV = torch.zeros_like(like_SV)
        return sums_SV.index_put((self.row_M, self.id_M), values_Y[self.text_M], accumulate=True)

    def later(self, cost_M: Tensor) -> Tensor:
        """The sum [M] of a cost over the tokens after each in its text."""
        parts = cost_M.split(self.length_Y.int().tolist())
        return torch.cat([each.sum() - each.cumsum(0) for each in parts])


def _all_scored(model: Table) -> ScoredTexts:
    """Every text within the window of a model, with random scores."""
    texts = all_texts()
    tokens = [(i, text, t) for i, text in enumerate(texts) for t in range(len(text))]
    generator = torch.Generator().manual_seed(5)
    return ScoredTexts(
        row_M=torch.tensor([model.row_of[text[:t]] for _, text, t in tokens]),
        id_M=torch.tensor([text[t] for _, text, t in tokens]),
        text_M=torch.tensor([i for i, _, _ in tokens]),
        length_Y=torch.tensor([len(text) for text in texts], dtype=torch.float64),
        score_Y=torch.randn(len(texts), generator=generator, dtype=torch.float64),
    )


def reward_identities(student: Table, start: Table) -> Iterator[Check]:
    """Check section 9 of docs/theory.md."""
    texts = _all_scored(student)
    yield from _groups(student, texts)
    yield from _divided(student, texts)
    yield from _clipped(student, texts)
    yield from _reused(student, texts)
    yield from _reward_and_kl(student, start, texts)
    yield from _optimum(start, texts)


def _written(student: Table, texts: ScoredTexts, weights_M: Tensor) -> Tensor:
    """The gradient [S, V] of the sum of weight times log q over all tokens, by training's pass."""
    loss_sum, _, _ = fused_loss(
        student.logits_SV[texts.row_M],
        student.head,
        None,
        None,
        LossTerms(cross_entropy=weights_M),
        labels_N=texts.id_M,
    )
    (gradient,) = torch.autograd.grad(-loss_sum, student.logits_SV)
    return gradient


def _of_mean_score(student: Table, texts: ScoredTexts) -> Tensor:
    """The gradient [S, V] of the mean score, by central differences."""
    return differences(student, lambda: texts.mean_score(student))


def _angle(a: Tensor, b: Tensor) -> float:
    """The angle between two gradients, in radians."""
    # Rounding can lead above 1.
    return math.acos(min(1.0, float((a * b).sum() / (a.norm() * b.norm()))))


def _centred(scores_KG: Tensor) -> Tensor:
    """The advantages of training: each score minus the mean of its group."""
    return _credited(scores_KG, Reward(advantage="mean"))


def _scaled(scores_KG: Tensor) -> Tensor:
    """The same over the standard deviation of the group."""
    return _credited(scores_KG, Reward(advantage="std"))


def _credited(scores_KG: Tensor, reward: Reward) -> Tensor:
    is_cut = [False] * scores_KG.shape[1]
    groups = [credits_of(scores, is_cut, reward) for scores in scores_KG.tolist()]
    advantages = [credit.advantage for group in groups for credit in group]
    return scores_KG.new_tensor(advantages).view_as(scores_KG)


def _over_groups(
    student: Table, texts: ScoredTexts, size: int, advantages: Callable[[Tensor], Tensor]
) -> Tensor:
    """The mean gradient [S, V] over every group of so many texts, by listing the groups.

    `advantages` turns the texts [K, G] of groups into what multiplies the gradient of each one's
    log-probability.
    """
    probs_Y = texts.probs(student)
    groups_KG = torch.cartesian_prod(*[torch.arange(len(probs_Y))] * size)
    weights_KG = probs_Y[groups_KG].prod(1, keepdim=True) * advantages(groups_KG) / size
    weights_Y = torch.zeros_like(probs_Y).index_add(0, groups_KG.flatten(), weights_KG.flatten())
    return _written(student, texts, weights_Y[texts.text_M])


def _groups(student: Table, texts: ScoredTexts) -> Iterator[Check]:
    exact = _of_mean_score(student, texts)
    for size in (2, 3):
        found = _over_groups(student, texts, size, lambda groups: _centred(texts.score_Y[groups]))
        yield Check(
            name=f"groups of {size}, centred scores: mean gradient = (1 - 1/{size}) grad E[score]",
            error=apart(found, (1 - 1 / size) * exact),
        )
    right = replace(texts, score_Y=(texts.score_Y > 0).double())
    found = _over_groups(student, right, size, lambda groups: _scaled(right.score_Y[groups]))
    p = float(right.mean_score(student).detach())
    factor = 0.0
    for k in range(1, size):
        deviation = math.sqrt(k * (size - k) / (size * (size - 1))) + LEAST_DEVIATION
        spread = k * (size - k) / (size * deviation)
        factor += math.comb(size, k) * p**k * (1 - p) ** (size - k) * spread
    factor /= size * p * (1 - p)
    yield Check(
        name=f"groups of {size}, scores 0 or 1 over their deviation: a factor of p, times grad p",
        error=apart(found, factor * _of_mean_score(student, right)),
    )


def _divided(student: Table, texts: ScoredTexts) -> Iterator[Check]:
    """Angles between the gradient of the mean score and those of advantages over something."""
    exact, size = _of_mean_score(student, texts), 3

    def deviation(groups_KG: Tensor) -> Tensor:
        return _scaled(texts.score_Y[groups_KG])

    def own_length(groups_KG: Tensor) -> Tensor:
        return _centred(texts.score_Y[groups_KG]) / texts.length_Y[groups_KG]

    def all_tokens(groups_KG: Tensor) -> Tensor:
        num_tokens_K1 = texts.length_Y[groups_KG].sum(1, keepdim=True)
        return _centred(texts.score_Y[groups_KG]) / num_tokens_K1

    for what, advantages in (
        ("graded scores over their deviation", deviation),
        ("each response over its own length", own_length),
        ("each group over its number of tokens", all_tokens),
    ):
        yield Check(
            name=f"groups of {size}, {what}: not along grad E[score], by an angle",
            error=_angle(_over_groups(student, texts, size, advantages), exact),
            bound=DISTANCE,
            differs=True,
        )


def _writer(student: Table) -> Table:
    """The student some updates ago, which wrote the texts that are used again."""
    writer = Table(seed=24, spread=DRIFT)
    with torch.no_grad():
        writer.logits_SV.add_(student.logits_SV)
    return writer


def _advantages(writer: Table, texts: ScoredTexts) -> Tensor:
    """The score of each token's text minus the writer's mean score [M]."""
    return (texts.score_Y - texts.mean_score(writer).detach())[texts.text_M]


def _ratios(student: Table, writer: Table, texts: ScoredTexts) -> Tensor:
    """The probability of each token over its writer's [M]."""
    return (texts.token_log_probs(student) - texts.token_log_probs(writer).detach()).exp()


def _surrogate(ratio_M: Tensor, advantage_M: Tensor) -> Tensor:
    """The clipped surrogate of each token [M] by its definition (arXiv 1707.06347)."""
    cut_M = ratio_M.clamp(1 - LOW, 1 + HIGH)
    return -torch.minimum(ratio_M * advantage_M, cut_M * advantage_M)


def _surrogate_gradient(student: Table, writer: Table, texts: ScoredTexts) -> Tensor:
    """The gradient [S, V] of the surrogate's mean over a writer's texts, by autograd."""
    loss_M = _surrogate(_ratios(student, writer, texts), _advantages(writer, texts))
    loss = (texts.probs(writer)[texts.text_M] * loss_M).sum()
    (gradient,) = torch.autograd.grad(loss, student.logits_SV)
    return gradient


def _clipped(student: Table, texts: ScoredTexts) -> Iterator[Check]:
    writer = _writer(student)
    ratio_M, advantage_M = _ratios(student, writer, texts).detach(), _advantages(writer, texts)
    probs_M = texts.probs(writer)[texts.text_M]
    weights_M = probs_M * ratio_M * advantage_M
    clipped_M = probs_M * surrogate_weight(ratio_M, advantage_M, (LOW, HIGH))
    found = _written(student, texts, clipped_M)
    yield Check(
        name="clipped surrogate: its gradient = -grad log q times the constant ratio A, or 0",
        error=apart(-found, _surrogate_gradient(student, writer, texts)),
    )
    whole = _written(student, texts, weights_M)
    for what, is_side_M in (("A >= 0", advantage_M >= 0), ("A < 0", advantage_M < 0)):
        free = _written(student, texts, torch.where(is_side_M, clipped_M, weights_M))
        yield Check(
            name=f"clipped surrogate: a part of the gradient is cut where {what}",
            error=float((free - whole).norm() / whole.norm()),
            bound=DISTANCE,
            differs=True,
        )
    yield Check(
        name="clipped surrogate before the first update: grad E[score]",
        error=apart(-_surrogate_gradient(student, student, texts), _of_mean_score(student, texts)),
    )


def _reused(student: Table, texts: ScoredTexts) -> Iterator[Check]:
    """The ratio of each token, and of the whole text, on another writer's texts."""
    writer, exact = _writer(student), _of_mean_score(student, texts)
    weights_M = texts.probs(writer)[texts.text_M] * _advantages(writer, texts)
    found = _written(student, texts, weights_M * _ratios(student, writer, texts).detach())
    name = "the ratio of each token alone, not clipped: not along grad E[score], by an angle"
    yield Check(name=name, error=_angle(found, exact), bound=DISTANCE, differs=True)
    ratio_Y = texts.probs(student) / texts.probs(writer)
    found = _written(student, texts, weights_M * ratio_Y[texts.text_M])
    yield Check(name="the ratio of the whole text: grad E[score]", error=apart(found, exact))


def _with_kl(student: Table, start: Table, texts: ScoredTexts, counts_later: bool) -> Tensor:
    """The gradient [S, V] of score minus reverse KL, as one pass of training computes it over every
    text of the student.

    With `counts_later` each written token also answers for the exact KLs of the tokens after it.
    """
    hidden_MV = student.logits_SV[texts.row_M]
    sides = (hidden_MV, student.head, start.logits_SV.detach()[texts.row_M], start.head)
    weights_M = texts.score_Y[texts.text_M]
    if counts_later:
        kl_M = fused_statistics(*sides).reverse_kl_N
        assert kl_M is not None, "a start model is given"
        weights_M = weights_M - START_KL * texts.later(kl_M.detach())
    loss_sum, _, _ = fused_loss(
        *sides,
        LossTerms(reverse=START_KL, cross_entropy=weights_M),
        labels_N=texts.id_M,
        weights_N=texts.probs(student)[texts.text_M],
    )
    (gradient,) = torch.autograd.grad(-loss_sum, student.logits_SV)
    return gradient


def _reward_and_kl(student: Table, start: Table, texts: ScoredTexts) -> Iterator[Check]:
    probs_Y, start_Y = texts.probs(student), texts.log_probs(start).detach()

    def objective() -> Tensor:
        log_q_Y = texts.log_probs(student)
        return (log_q_Y.exp() * (texts.score_Y - START_KL * (log_q_Y - start_Y))).sum()

    def with_constant_prefixes() -> Tensor:
        log_q_SV = student.logits_SV.log_softmax(-1)
        kl_S = (log_q_SV.exp() * (log_q_SV - start.logits_SV.log_softmax(-1))).sum(-1)
        return (
            texts.mean_score(student) - START_KL * (probs_Y[texts.text_M] * kl_S[texts.row_M]).sum()
        )

    exact = differences(student, objective)
    both = _with_kl(student, start, texts, counts_later=True)
    yield Check(
        name="reward, local KL and later KLs in one pass: grad (E[score] - w KL(Q || P))",
        error=apart(both, exact),
    )
    reward = _written(student, texts, (probs_Y * texts.score_Y)[texts.text_M])
    unscored = replace(texts, score_Y=torch.zeros_like(probs_Y))
    kl = _with_kl(student, start, unscored, counts_later=True)
    yield Check(name="reward and KL in one pass = the sum of two", error=apart(both, reward + kl))
    local = _with_kl(student, start, texts, counts_later=False)
    yield Check(
        name="reward and local KL: grad (E[score] - w E sum_t KL_t), the KL's prefixes constant",
        error=apart(local, differences(student, with_constant_prefixes)),
    )
    name = "reward and local KL: not grad (E[score] - w KL(Q || P))"
    yield Check(name=name, error=apart(local, exact), bound=DISTANCE, differs=True)
    drawn_Y = texts.score_Y - START_KL * (texts.log_probs(student).detach() - start_Y)
    found = _written(student, texts, (probs_Y * drawn_Y)[texts.text_M])
    yield Check(
        name="score minus w times the text's drawn log-ratio as the reward: the same gradient",
        error=apart(found, exact),
    )


def _climbed(start: Table, texts: ScoredTexts, counts_later: bool) -> Table:
    """A student after gradient steps on score minus reverse KL."""
    student = Table(seed=1)
    for _ in range(NUM_STEPS):
        gradient_SV = _with_kl(student, start, texts, counts_later)
        # Over how often each token is written: the natural gradient of a table.
        often_SV = texts.sums(texts.probs(student), gradient_SV)
        with torch.no_grad():
            student.logits_SV.add_(0.5 / START_KL * gradient_SV / often_SV)
    return student


def _optimum(start: Table, texts: ScoredTexts) -> Iterator[Check]:
    best_Y = (texts.log_probs(start).detach() + texts.score_Y / START_KL).log_softmax(0)

    def distance(student: Table) -> float:
        return float((texts.probs(student) * (texts.log_probs(student).detach() - best_Y)).sum())

    yield Check(
        name="gradient steps on E[score] - w KL(Q || P) reach p* ~ p exp(score / w): KL(q || p*)",
        error=abs(distance(_climbed(start, texts, counts_later=True))),
    )
    student = _climbed(start, texts, counts_later=False)
    name = "gradient steps on reward and local KL do not: KL(q || p*)"
    yield Check(name=name, error=distance(student), bound=DISTANCE, differs=True)
    log_p_SV, probs_Y = start.logits_SV.detach().log_softmax(-1), texts.probs(student)
    mean_SV = texts.sums(probs_Y * texts.score_Y, log_p_SV) / texts.sums(probs_Y, log_p_SV)
    yield Check(
        name="they reach q ~ p exp(mean score to come / w) after each prefix",
        error=apart(
            student.logits_SV.log_softmax(-1), (log_p_SV + mean_SV / START_KL).log_softmax(-1)
        ),
    )
