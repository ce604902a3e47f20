"""The fields of the loss: on whose tokens, which divergence, from what signal, how its weight
moves, and the reward beside it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from potstill.config.methods import METHODS
from potstill.config.roles import Place, Role
from potstill.config.section import Section
from potstill.config.values import COLDEST, MANY_AT_ONCE, Arguments, NonNegative
from potstill.config.weightings import WEIGHTINGS

DivergenceName = Literal[
    "forward", "reverse", "mixed", "jsd", "skew-forward", "skew-reverse", "none"
]


class Objective(Section, role=Role.OBJECTIVE):
    prefix: Annotated[
        Literal["teacher", "student", "dataset", "mixed"], Role.PREFIX, Place.FIRST
    ] = "teacher"
    """Who writes the tokens that both models are conditioned on. No gradient goes through them."""
    prefix_mix: Annotated[Literal["sequence", "handoff", "token"], Role.PREFIX] = "sequence"
    """prefix = mixed: whole rollouts by one model each; one model begins and the other goes on; or
    token by token."""
    student_share: Annotated[float, Role.PREFIX] = Field(default=0.5, ge=0, le=1)
    """mixed by sequence: the exact share of rollouts by the student; mixed by token: the weight of
    its distribution."""
    first_writer: Annotated[Literal["teacher", "student"], Role.PREFIX] = "teacher"
    """mixed by handoff: who begins."""
    handoff_tokens: Annotated[tuple[int, int], Role.PREFIX] = (8, 64)
    """mixed by handoff: the first writer's tokens, drawn evenly from this range (both ends
    included)."""
    kl: Annotated[DivergenceName, Role.DIVERGENCE, Place.FIRST] = "forward"
    """forward: KL(teacher || student); reverse: KL(student || teacher); mixed: their linear
    mixture; jsd: the generalised Jensen-Shannon divergence; skew-forward, skew-reverse: each KL to
    a mixture of both (DistiLLM); none: no teacher, the reward alone."""
    forward_weight: Annotated[float, Role.DIVERGENCE] = Field(default=0.5, ge=0, le=1)
    """Weight of the forward KL in kl = mixed, or what its schedule (section weight_schedule) begins
    with."""
    jsd_weight: Annotated[float, Role.DIVERGENCE] = Field(default=0.5, gt=0, lt=1)
    """kl = jsd: the teacher's weight in the mixture that both models are compared with."""
    skew: Annotated[float, Role.DIVERGENCE] = Field(default=0.1, gt=0, lt=1)
    """kl = skew-forward, skew-reverse: how much of the first model is mixed into the second."""
    gamma: Annotated[float, Role.TOKEN_WEIGHT] = Field(default=0.0, ge=0, le=1)
    """Student prefixes and reverse KL: how much of the later tokens' KL each written token answers
    for. 0: the local gradient; 1: that of the whole sequence's KL."""
    weights: Annotated[str | None, Role.TOKEN_WEIGHT] = None
    """Weighting of each token: a name, as `potstill methods` lists them, or a function in a file of
    yours (my_weights.py:weights, whose code is run)."""
    weights_arguments: Annotated[Arguments, Role.TOKEN_WEIGHT] = Field(default_factory=dict)
    """Arguments of the weighting, such as {num = 50}."""
    temperature: float = Field(default=1.0, ge=COLDEST)
    """Divides both models' logits in the loss; sampling has its own."""
    signal: Literal["full", "topk", "sampled", "spans", "labels"] = "full"
    """full: the exact KL over the whole vocabulary; topk: the exact KL between the teacher's top_k
    tokens and one class for the rest; sampled: an estimate from the teacher's log-probability of
    each token that the student wrote; spans: the same of a teacher with another tokenizer, for what
    stands between two places where both cut a text; labels: cross-entropy on the written tokens,
    without a teacher."""
    top_k: int = Field(default=64, ge=1)
    """signal = topk: how many of the teacher's likeliest tokens are kept apart."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """signal = sampled, spans: k1 = log q/p as a constant reward and k2 = (log q/p)^2 / 2 have the
    reverse KL's gradient in expectation, k3 = p/q - 1 - log p/q has the forward KL's."""
    baseline: Literal["none", "exact"] = "none"
    """estimator = k1: subtract the reward's exact mean, minus the reverse KL; that needs the
    teacher's whole output."""
    end_class: Literal["merged", "raw"] = "merged"
    """merged: where the two models' end tokens are more than one, they count as one class in the
    loss, so that either may end a text in its own way; raw: each is a token like others."""
    separate_ends: tuple[str, ...] | None = None
    """end_class = merged: end tokens that mean something else than the end of an answer, as the
    tokenizer names them. They end a completion and have no part in the class. By default those that
    are known to hand over to a tool, such as <|eom_id|> and <|call|>; a list takes their place."""

    @property
    def has_divergence(self) -> bool:
        """Whether the loss has a divergence from a teacher."""
        return self.signal != "labels" and self.kl != "none"

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher, to learn from or to write."""
        return self.has_divergence or self.prefix in ("teacher", "mixed")

    @property
    def weighting_arguments(self) -> dict[str, Any]:
        """The arguments of the weighting, those that are not set by their defaults."""
        if self.weights not in WEIGHTINGS:
            return self.weights_arguments
        known = WEIGHTINGS[self.weights].arguments
        return {name: each.default for name, each in known.items()} | self.weights_arguments

    @property
    def name(self) -> str:
        """The method's name: a corner of the grid, or what lies between with its weights."""
        if self.kl == "none":
            return "GRPO"
        if self.signal == "labels":
            return f"Hard-label SFT ({self.prefix} prefix)"
        details = [f"top {self.top_k}"] if self.signal == "topk" else []
        details += [self.estimator] if self.signal == "sampled" else []
        details += [f"spans, {self.estimator}"] if self.signal == "spans" else []
        details += [f"gamma {self.gamma:g}"] if self.gamma else []
        if self.weights is not None:
            arguments = [f"{name} {value}" for name, value in self.weighting_arguments.items()]
            details.append(" ".join([self.weights, *arguments]))
        for method in METHODS.values():
            if (self.prefix, self.kl) == (method.prefix, method.kl):
                return method.name + (f" ({', '.join(details)})" if details else "")
        kl: str = self.kl
        if self.kl == "mixed":
            kl = f"{self.forward_weight:g} forward + {1 - self.forward_weight:g} reverse"
        elif self.kl == "jsd":
            kl = f"jsd {self.jsd_weight:g}"
        elif self.kl.startswith("skew"):
            kl = f"{self.kl} {self.skew:g}"
        prefix: str = self.prefix
        if self.prefix == "mixed" and self.prefix_mix == "handoff":
            prefix = (
                f"{self.first_writer} first for "
                f"{self.handoff_tokens[0]}-{self.handoff_tokens[1]} tokens"
            )
        elif self.prefix == "mixed":
            prefix = f"{self.student_share:g} student by {self.prefix_mix}"
        return f"Hybrid({'; '.join([f'{prefix} / {kl}', *details])})"


class WeightSchedule(Section, role=Role.WEIGHT_SCHEDULE):
    """How the forward weight of kl = "mixed" changes over a run, from objective.forward_weight
    on."""

    schedule: Literal["constant", "linear", "cosine", "steps", "entropy"] = "constant"
    """linear, cosine: to end_weight; steps: as at_steps says; entropy: up when the student's
    entropy before the answer falls below a floor, down when it is above."""
    end_weight: float = Field(default=0.0, ge=0, le=1)
    """linear, cosine: the forward weight at the end."""
    over_steps: int | None = Field(default=None, ge=1)
    """linear, cosine: steps until end_weight is reached; all steps of the run by default."""
    at_steps: tuple[tuple[int, float], ...] = ()
    """steps: pairs (step, forward weight); each weight holds from its step on."""
    reference: Literal["first", "absolute", "teacher"] = "first"
    """entropy: the floor is a share of the first step's entropy, a number of nats, or a share of
    the teacher's entropy on the same tokens."""
    floor: float = Field(default=0.5, gt=0)
    """entropy: below this the weight rises."""
    band: float = Field(default=0.1, ge=0)
    """entropy: the weight falls only above floor + band, so that it does not swing."""
    rate: float = Field(default=0.02, gt=0, le=1)
    """entropy: the most that the weight changes in a step."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """entropy: the smallest and the largest weight."""


def _group_size(fields: dict[str, Any]) -> int:
    """The responses to a prompt of a run that does not say."""
    return 8 if fields.get("weight") else 1


class Reward(Section, role=Role.OBJECTIVE):
    """The scores of responses as one more term of the loss: a policy gradient in the same pass as
    the divergence (arXiv 2402.03300, 2506.02208)."""

    weight: Annotated[float, Role.REWARD, Place.FIRST] = Field(default=0.0, ge=0)
    """Weight of the policy gradient beside the divergence, whose weight is 1; 0: none. With
    objective.kl = none it is alone."""
    group_size: int = Field(default_factory=_group_size, ge=1, le=MANY_AT_ONCE)
    """Responses to each prompt, whose scores are compared with each other. By default 8 where
    reward.weight is above 0, else 1."""
    advantage: Literal["mean", "std", "score"] = "std"
    """mean: the score minus the mean of its group; std: that over the group's standard deviation;
    score: the score as it is."""
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2)
    """rollouts.reuse above 1: how far below and above 1 the ratio of the student's probability of a
    token to that when it wrote it may go, before the token's policy gradient is left out."""
    truncated: Literal["score", "zero", "mask"] = "score"
    """Responses that the window cut. score: they count as others do; zero: their score is 0; mask:
    they have no part in their group and no policy gradient."""
    source: str | None = None
    """Function of yours that scores responses (my_reward.py:score, whose code is run), in place of
    the task's scores."""
    start_kl: Annotated[float, Role.REWARD] = Field(default=0.0, ge=0)
    """Weight of the exact KL(student || start), with the student as it was before the first step,
    which is then kept in memory; 0 does without."""

    @property
    def is_off(self) -> bool:
        """Whether the loss has no term of this section."""
        return not self.weight and not self.start_kl
