"""Weights of a loss's terms at a group of rows: given once for all, or by a function of what the
first pass found there."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from potstill.kl.terms import (
    MIXTURE_TERMS,
    TEACHER_TERMS,
    LossTerms,
    TermsFunction,
    TokenStats,
    Weight,
    is_there,
)


class KnownInputs(NamedTuple):
    """The inputs of a call on which it depends what terms there can be."""

    has_teacher: bool
    has_labels: bool
    mixture_weight: float | None


def asked_mixture(terms: LossTerms | TermsFunction, mixture_weight: float | None) -> float | None:
    """The mixture weight that a call asks for: its own, or else that of fixed terms which need
    one."""
    if mixture_weight is None and isinstance(terms, LossTerms) and terms.has_mixture:
        return terms.mixture_weight
    return mixture_weight


def terms_of_rows(
    terms: LossTerms | TermsFunction, stats: TokenStats, rows: slice, mixture_weight: float | None
) -> LossTerms:
    """The terms of some rows, whose statistics are `stats`. Raises ValueError for a function's that
    do not fit."""
    if isinstance(terms, LossTerms):
        return terms.of_rows(rows)
    # A weight that is made from a parameter shows it only where gradients are on.
    with torch.enable_grad():
        given = terms(stats, rows)
    who = f"the function of terms, for rows {rows.start} to {rows.stop}: "
    if not isinstance(given, LossTerms):
        raise ValueError(f"{who}it returned {type(given).__name__}; return LossTerms")
    has_teacher, has_labels = stats.forward_kl_N is not None, stats.student_log_prob_N is not None
    known = KnownInputs(has_teacher, has_labels, mixture_weight)
    _check_each(given, known, num_rows=len(stats.student_entropy_N), who=who)
    return given


def check_terms(terms: LossTerms | TermsFunction, known: KnownInputs, num_rows: int) -> None:
    """Raise ValueError for fixed terms that do not fit; those of a function are checked when they
    come."""
    if not isinstance(terms, LossTerms):
        return
    if not any(map(is_there, terms.weights.values())):
        raise ValueError("every term of the loss has weight 0; give at least one another weight")
    _check_each(terms, known, num_rows=num_rows, who="")


def _check_each(terms: LossTerms, known: KnownInputs, num_rows: int, who: str) -> None:
    for name, weight in terms.weights.items():
        check_weight(f"{who}{name}", weight, num_rows)
        if not is_there(weight):
            continue
        if not known.has_teacher and name in TEACHER_TERMS:
            raise ValueError(f"{who}the term {name} needs a teacher's hidden states and head")
        if not known.has_labels and name == "cross_entropy":
            raise ValueError(f"{who}the term cross_entropy needs labels_N")
        if name in MIXTURE_TERMS and terms.mixture_weight != known.mixture_weight:
            raise ValueError(
                f"{who}the term {name} has mixture_weight {terms.mixture_weight} and the call "
                f"{known.mixture_weight}; give both the same"
            )


def check_weight(name: str, weight: Weight, num_rows: int) -> None:
    """Raise ValueError for a weight that is no finite constant, or not one a row."""
    if not isinstance(weight, Tensor):
        if not isinstance(weight, int | float):
            raise ValueError(f"{name} is a {type(weight).__name__}; give a number or a tensor")
        if not math.isfinite(weight):
            raise ValueError(f"{name} is {weight}; give a finite number")
        return
    if weight.shape != (num_rows,):
        raise ValueError(
            f"{name} is a tensor {list(weight.shape)}; give [{num_rows}], one number a row"
        )
    if not weight.is_floating_point():
        raise ValueError(f"{name} is a tensor of {weight.dtype}; give floating-point numbers")
    if weight.requires_grad:
        raise ValueError(f"{name} is a tensor with a gradient; weights are constants: detach it")
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name} holds {weight[~torch.isfinite(weight)][0].item()}; give finite numbers"
        )
