"""Weightings of the loss by name: what each does to a token's terms, from which paper, and what it
needs. The functions are in `potstill.objectives.weightings`."""

from typing import Any, NamedTuple

from potstill.console.names import nearest


class Argument(NamedTuple):
    """An argument of a weighting: its default, and the least and the most that it may be."""

    default: float
    low: float
    high: float


class Weighting(NamedTuple):
    """A weighting that `objective.weights` can name.

    `kls` are the divergences that it can weigh, all where it is empty. `needs_scores`: it reads the
    scores of responses; `needs_student`: it is about tokens that the student wrote;
    `needs_log_probs`: it reads how likely the written token is; `needs_head_share`: it reads where
    both distributions differ; `needs_older`: it is about an older student's tokens; `is_reward`: it
    is a reward of the tokens that were drawn, in the place of the divergence.
    """

    about: str
    source: str
    arguments: dict[str, Argument]
    kls: tuple[str, ...] = ()
    needs_scores: bool = False
    needs_student: bool = False
    needs_log_probs: bool = False
    needs_head_share: bool = False
    needs_older: bool = False
    is_reward: bool = False


MUCH = 1e6

NOTATION = (
    "p is the teacher, q the student, y the written token, t its place in the completion from 0, "
    "s the score of its response, and the loss that of the recipe's own divergence."
)
WEIGHTINGS: dict[str, Weighting] = {
    "entropy-aware": Weighting(
        "the mixture of both KLs where the teacher's entropy is above `above` nats, the reverse KL "
        "elsewhere",
        "EOPD, arXiv 2603.07079",
        {"above": Argument(0.8, 0, MUCH)},
        kls=("mixed",),
    ),
    "todi": Weighting(
        "forward KL at weight a = sigmoid(log p(y) - log q(y)), reverse KL at 1 - a",
        "ToDi, arXiv 2505.16297, which has such a weight for each entry of the vocabulary",
        {},
        kls=("mixed",),
        needs_log_probs=True,
    ),
    "akl": Weighting(
        "forward KL at the share of sum |p - q| that lies on the teacher's likeliest tokens with "
        "`mass` of p, reverse KL at the rest; takes a product of both heads of its own",
        "AKL, arXiv 2404.02657",
        {"mass": Argument(0.5, 0, 1)},
        kls=("mixed",),
        needs_head_share=True,
    ),
    "by-writer": Weighting(
        "forward KL where the teacher wrote, reverse KL where the student did",
        "DistiLLM-2's pairing without skew, arXiv 2503.07067",
        {},
        kls=("mixed",),
    ),
    "first-tokens": Weighting(
        "the loss of the first `num` tokens of a completion alone",
        "ESR, arXiv 2605.27028",
        {"num": Argument(100, 1, MUCH)},
    ),
    "split": Weighting(
        "the loss times `before` at t < `at`, times `after` from there on",
        "docs/theory.md, section 1",
        {
            "at": Argument(100, 1, MUCH),
            "before": Argument(1, 0, MUCH),
            "after": Argument(0, 0, MUCH),
        },
    ),
    "position-decay": Weighting(
        "the loss times 2^(-t / `half_life`)",
        "position weights, arXiv 2605.21606",
        {"half_life": Argument(100, 1e-3, MUCH)},
    ),
    "importance": Weighting(
        "the loss times 1 + `gamma` (1 - A_t / A), with A_t the sum of |log p(y) - log q(y)| over "
        "the rollout's tokens before t, A over all",
        "IW-OPD, arXiv 2606.22600",
        {"gamma": Argument(0.5, 0, MUCH)},
        needs_student=True,
        needs_log_probs=True,
    ),
    "prefix-ratio": Weighting(
        "the loss times the student's probability of the rollout's tokens before t over that of "
        "the older student that wrote them into a cache, at most `cap`",
        "prefix importance weights as of REVO, arXiv 2609.37500, cut off above",
        {"cap": Argument(2, 1e-3, MUCH)},
        needs_student=True,
        needs_log_probs=True,
        needs_older=True,
    ),
    "least-likely": Weighting(
        "-`constant` as the reward of the `share` of a rollout's tokens that were least likely to "
        "be written, nothing else: a baseline without a teacher",
        "OPSA, arXiv 2608.31046",
        {"share": Argument(0.2, 0, 1), "constant": Argument(1, 0, MUCH)},
        needs_student=True,
        needs_log_probs=True,
        is_reward=True,
    ),
    "bounded-reward": Weighting(
        "(p(y)^`power` - q(y)^`power`) / `power` as the reward of a token",
        "PowerOPD, arXiv 2606.17199",
        {"power": Argument(1, 1e-3, MUCH)},
        kls=("reverse",),
        needs_student=True,
        needs_log_probs=True,
        is_reward=True,
    ),
    "sign-gate": Weighting(
        "the loss times `agree` where log p(y) - log q(y) and s - 1/2 have one sign, times "
        "`disagree` elsewhere",
        "OPDVR, arXiv 2608.24696; SG-OPD, arXiv 2606.09304, with `agree` above 1",
        {"agree": Argument(1, 0, MUCH), "disagree": Argument(0, 0, MUCH)},
        needs_scores=True,
        needs_student=True,
        needs_log_probs=True,
    ),
    "forward-if-right": Weighting(
        "forward KL on responses with s of at least 1/2, reverse KL on the others",
        "OG-OPSD, arXiv 2610.05070, without its cut at the first mistake",
        {},
        kls=("mixed",),
        needs_scores=True,
        needs_student=True,
    ),
    "pass-rate": Weighting(
        "the loss times r (1 - r), with r the mean score of the responses to the prompt",
        "PACED, arXiv 2603.11178",
        {},
        needs_scores=True,
        needs_student=True,
    ),
}


def check_named(name: str, arguments: dict[str, Any]) -> None:
    """Raise ValueError for a weighting that is not there, or arguments that it does not take."""
    if name not in WEIGHTINGS:
        near = nearest(name, list(WEIGHTINGS))
        raise ValueError(
            f"objective.weights is {name!r}"
            + (f"; the nearest is {near!r}" if near else "")
            + f"; choose one of {', '.join(WEIGHTINGS)}, or a function of yours such as "
            "my_weights.py:weights"
        )
    known = WEIGHTINGS[name].arguments
    for argument, value in arguments.items():
        where = f"objective.weights_arguments.{argument} is {value!r}"
        if argument not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise ValueError(f"{where}, and the weighting {name!r} {takes}; remove it")
        low, high = known[argument].low, known[argument].high
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where}; give a number")
        if not low <= value <= high:
            raise ValueError(f"{where}; give a number from {low:g} to {high:g}")
