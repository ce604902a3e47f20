"""The fields of the loss: on whose tokens, which divergence, from what signal, and how its weight
moves."""

from typing import Annotated, Literal

from pydantic import Field

from potstill.config.methods import METHODS
from potstill.config.roles import Place, Role
from potstill.config.section import Section
from potstill.config.values import COLDEST, NonNegative

DivergenceName = Literal["forward", "reverse", "mixed", "jsd", "skew-forward", "skew-reverse"]


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
    a mixture of both (DistiLLM)."""
    forward_weight: Annotated[float, Role.DIVERGENCE] = Field(default=0.5, ge=0, le=1)
    """Weight of the forward KL in kl = mixed, or what its schedule (section weight_schedule) begins
    with."""
    forward_above: Annotated[float | None, Role.TOKEN_WEIGHT] = Field(default=None, ge=0)
    """kl = mixed: only where the teacher's entropy (nats) is above this; elsewhere all weight is
    the reverse KL's."""
    jsd_weight: Annotated[float, Role.DIVERGENCE] = Field(default=0.5, gt=0, lt=1)
    """kl = jsd: the teacher's weight in the mixture that both models are compared with."""
    skew: Annotated[float, Role.DIVERGENCE] = Field(default=0.1, gt=0, lt=1)
    """kl = skew-forward, skew-reverse: how much of the first model is mixed into the second."""
    gamma: Annotated[float, Role.TOKEN_WEIGHT] = Field(default=0.0, ge=0, le=1)
    """Student prefixes and reverse KL: how much of the later tokens' KL each written token answers
    for. 0: the local gradient; 1: that of the whole sequence's KL."""
    split: Annotated[int | None, Role.TOKEN_WEIGHT] = Field(default=None, ge=1)
    """A position in the completion: tokens before it and tokens from it on have weights of their
    own."""
    split_weights: Annotated[tuple[NonNegative, NonNegative], Role.TOKEN_WEIGHT] = (1.0, 1.0)
    """Weights of the loss before the split and from it on."""
    temperature: float = Field(default=1.0, ge=COLDEST)
    """Divides both models' logits in the loss; sampling has its own."""
    signal: Literal["full", "topk", "sampled", "labels"] = "full"
    """full: the exact KL over the whole vocabulary; topk: the exact KL between the teacher's top_k
    tokens and one class for the rest; sampled: an estimate from the teacher's log-probability of
    each token that the student wrote; labels: cross-entropy on the written tokens, without a
    teacher."""
    top_k: int = Field(default=64, ge=1)
    """signal = topk: how many of the teacher's likeliest tokens are kept apart."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """signal = sampled: k1 = log q/p as a constant reward and k2 = (log q/p)^2 / 2 have the reverse
    KL's gradient in expectation, k3 = p/q - 1 - log p/q has the forward KL's."""
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
    def name(self) -> str:
        """The method's name: a corner of the grid, or what lies between with its weights."""
        if self.signal == "labels":
            return f"Hard-label SFT ({self.prefix} prefix)"
        details = [f"top {self.top_k}"] if self.signal == "topk" else []
        details += [self.estimator] if self.signal == "sampled" else []
        details += [f"gamma {self.gamma:g}"] if self.gamma else []
        if self.split is not None:
            details.append(
                f"split at {self.split}: {self.split_weights[0]:g}, {self.split_weights[1]:g}"
            )
        for method in METHODS.values():
            if (self.prefix, self.kl) == (method.prefix, method.kl):
                return method.name + (f" ({', '.join(details)})" if details else "")
        kl: str = self.kl
        if self.kl == "mixed":
            kl = f"{self.forward_weight:g} forward + {1 - self.forward_weight:g} reverse"
            kl += "" if self.forward_above is None else f" above {self.forward_above:g} nats"
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
