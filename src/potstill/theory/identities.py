"""The theory as numbers: `potstill verify` checks each identity of docs/theory.md on models small
enough to enumerate.

The two models are tables: each prefix has its own row of logits, over a vocabulary of three tokens
of which token 0 ends the text, and a window of three tokens. So every text can be listed with its
probability, and every expectation is a finite sum. One side of each identity is what training
computes (`batch_loss` and what it calls, in float64); the other is written out here from the
definition alone, or is a central difference of it.

Notation as in docs/theory.md: p teacher, q student, s a prefix, y a text, d^T and d^q the
distributions of prefixes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from potstill.config import Objective
from potstill.objectives.loss import Loss, batch_loss, later_costs
from potstill.rollouts.batching import make_batch
from potstill.theory.check import DISTANCE, Check
from potstill.theory.divergences import coarse, divergences
from potstill.theory.entropy import entropy_identities
from potstill.theory.enumeration import (
    END,
    WINDOW,
    Table,
    Text,
    V,
    all_texts,
    apart,
    by_prefix,
    differences,
    expectation,
    score_sum,
    sequence_kl,
)
from potstill.theory.reward import reward_identities
from potstill.types import Example, Prompt, Rollout, Stop


def trained(
    student: Table,
    teacher: Table,
    writer: Table,
    options: dict[str, Any],
    window: int = WINDOW,
    baseline_T: Tensor | None = None,
) -> tuple[float, Tensor]:
    """The value and gradient [S, V] that training computes on every text of a writer, weighted by
    its probability."""
    loss = Loss(objective=Objective(**options), normalize="token", vocab_size=V)
    student.zero_grad()
    value = 0.0
    for text in all_texts(window):
        stop: Stop = "end" if text[-1] == END else "length"
        prompt = Prompt(example=Example(id="x", prompt="x"), token_ids=(1,))
        rollout = Rollout(
            prompt=prompt,
            completion_ids=text,
            trained=(True,) * len(text),
            writers=("student",) * len(text),
            stop=stop,
        )
        batch = make_batch([rollout])
        hidden_NE = teacher.signal_at(batch).detach()
        probability = writer.log_prob(text).exp().item()
        returns_N = None
        if loss.objective.gamma:
            returns_N = later_costs(student, teacher, batch, loss)  # pyright: ignore[reportArgumentType]
            returns_N = (
                returns_N if baseline_T is None else returns_N - baseline_T[: len(returns_N)]
            )
        given = (student, teacher, hidden_NE, batch, loss, 1 / probability, returns_N)
        loss_sum, loss_N, _ = batch_loss(*given)  # pyright: ignore[reportArgumentType]
        loss_sum.backward()
        value += probability * float(loss_N.sum())
    assert student.logits_SV.grad is not None
    return value, student.logits_SV.grad.clone()


CELLS = [(prefix, kind) for prefix in ("teacher", "student") for kind in ("forward", "reverse")]


def identities() -> Iterator[Check]:
    """Check each identity, one after the other in the order of docs/theory.md."""
    student, teacher = Table(seed=1), Table(seed=2, spread=1.5)
    yield from _chain_rules(student, teacher)
    yield from _cells(student, teacher)
    yield from _rewritten_gradients(student, teacher)
    yield from _dropped_terms(student, teacher)
    yield from _offline_rl(student, teacher)
    yield from _estimators(student, teacher)
    yield from _splits(student, teacher)
    yield from divergences()
    yield from coarse()
    yield from reward_identities(student, teacher)
    yield from entropy_identities()


def _options(prefix: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"prefix": prefix, "kl": kind, **more}


def _chain_rules(student: Table, teacher: Table) -> Iterator[Check]:
    for kind, who, writer in (("forward", "d^T", teacher), ("reverse", "d^q", student)):
        prefix = "teacher" if writer is teacher else "student"
        for window in range(WINDOW, 0, -1):
            value, _ = trained(student, teacher, writer, _options(prefix, kind), window)
            what = (
                "chain rule"
                if window == WINDOW
                else f"window of {window} = KL of the {window}-token marginals"
            )
            name = f"{what}: sequence {kind} KL = sum_t E_{who}[{kind} KL]"
            yield Check(name=name, error=apart(value, sequence_kl(kind, student, teacher, window)))


def _cells(student: Table, teacher: Table) -> Iterator[Check]:
    for prefix, kind in CELLS:
        writer = teacher if prefix == "teacher" else student
        weights = {text: writer.log_prob(text).exp().item() for text in all_texts()}

        def frozen(kind: str = kind, weights: dict[Text, float] = weights) -> Tensor:
            sums = [
                weight * sum(by_prefix(kind, student, teacher, text[:t]) for t in range(len(text)))
                for text, weight in weights.items()
            ]
            return torch.stack([torch.as_tensor(part) for part in sums]).sum()

        _, gradient = trained(student, teacher, writer, _options(prefix, kind))
        name = (
            f"{prefix} prefix, {kind} KL: gradient = differences of its expectation, "
            "prefixes frozen"
        )
        yield Check(name=name, error=apart(gradient, differences(student, frozen)))


def _rewritten_gradients(student: Table, teacher: Table) -> Iterator[Check]:
    for prefix, writer in (("teacher", teacher), ("student", student)):
        cross_entropy = expectation(
            writer, lambda s: -(teacher.log_probs(s).exp() * student.log_probs(s)).sum()
        )
        (soft,) = torch.autograd.grad(cross_entropy, student.logits_SV)
        _, gradient = trained(student, teacher, writer, _options(prefix, "forward"))
        yield Check(
            name=f"{prefix} prefix: forward-KL gradient = soft cross-entropy gradient",
            error=apart(gradient, soft),
        )

        def surrogate(s: Text) -> Tensor:
            log_q, log_p = student.log_probs(s), teacher.log_probs(s)
            reward = (log_p - log_q).detach()
            return -(log_q.detach().exp() * reward * log_q).sum()

        (policy,) = torch.autograd.grad(expectation(writer, surrogate), student.logits_SV)
        _, gradient = trained(student, teacher, writer, _options(prefix, "reverse"))
        name = (
            f"{prefix} prefix: reverse-KL gradient = policy gradient with reward log p - log "
            "q, a ~ q"
        )
        yield Check(name=name, error=apart(gradient, policy))


def _later(
    student: Table, teacher: Table, kind: str, gamma: float = 1.0
) -> Callable[[Text, int], float]:
    """sum over u > t of gamma^(u - t) KL_u along a text."""
    return lambda text, t: sum(
        gamma ** (u - t) * by_prefix(kind, student, teacher, text[:u]).item()
        for u in range(t + 1, len(text))
    )


def _dropped_terms(student: Table, teacher: Table) -> Iterator[Check]:
    for kind in ("forward", "reverse"):

        def moving(kind: str = kind) -> Tensor:
            return expectation(
                student, lambda s: by_prefix(kind, student, teacher, s), frozen=False
            )

        whole = differences(student, moving)
        _, local = trained(student, teacher, student, _options("student", kind))
        dropped = score_sum(student, student, _later(student, teacher, kind))
        name = (
            f"student prefix, {kind} KL: moving prefixes add E sum_t (sum_u>t KL_u) grad log q(y_t)"
        )
        yield Check(name=name, error=apart(whole, local + dropped))
        yield Check(
            name=f"student prefix, {kind} KL: the dropped term is not zero",
            error=apart(whole, local),
            bound=DISTANCE,
            differs=True,
        )
    whole = differences(student, lambda: sequence_kl("reverse", student, teacher))
    _, full = trained(student, teacher, student, _options("student", "reverse", gamma=1.0))
    yield Check(
        name="gamma = 1: gradient = differences of the sequence reverse KL",
        error=apart(full, whole),
    )
    _, local = trained(student, teacher, student, _options("student", "reverse"))
    for gamma in (0.0, 0.5):
        _, gradient = trained(
            student, teacher, student, _options("student", "reverse", gamma=gamma)
        )
        expected = local + score_sum(student, student, _later(student, teacher, "reverse", gamma))
        yield Check(
            name=f"gamma = {gamma:g}: later KLs count gamma^(u - t)",
            error=apart(gradient, expected),
        )
    options, baseline_T = (
        _options("student", "reverse", gamma=1.0),
        torch.tensor([0.7, -0.4, 1.3], dtype=torch.float64),
    )
    _, with_baseline = trained(student, teacher, student, options, WINDOW, baseline_T)
    yield Check(
        name="gamma = 1: a baseline a position changes no expectation",
        error=apart(with_baseline, full),
    )
    # The same expectation from the log-ratios that were drawn, which gamma replaces by their means.
    drawn = score_sum(
        student,
        student,
        lambda text, t: sum(
            (student.log_probs(text[:u]) - teacher.log_probs(text[:u]))[text[u]].item()
            for u in range(t + 1, len(text))
        ),
    )
    yield Check(
        name="gamma = 1: exact later KLs = drawn later log-ratios, in expectation",
        error=apart(full, local + drawn),
    )


def _offline_rl(student: Table, teacher: Table) -> Iterator[Check]:
    _, gradient = trained(student, teacher, teacher, _options("teacher", "reverse"))
    inner_over_student = torch.zeros((), dtype=torch.float64)
    inner_over_teacher = torch.zeros((), dtype=torch.float64)
    weighted = torch.zeros((), dtype=torch.float64)
    for text in all_texts():
        probability = teacher.log_prob(text).exp().item()
        for t, written in enumerate(text):
            log_q, log_p = student.log_probs(text[:t]), teacher.log_probs(text[:t])
            ratio = (log_p - log_q).detach()
            inner_over_student = (
                inner_over_student - probability * (log_q.detach().exp() * ratio * log_q).sum()
            )
            # The token that the teacher wrote there, as it is and with the weight q / p.
            one = -probability * ratio[written] * log_q[written]
            inner_over_teacher, weighted = (
                inner_over_teacher + one,
                weighted + one * (-ratio[written]).exp(),
            )
    own, other, reweighted = (
        torch.autograd.grad(total, student.logits_SV, retain_graph=True)[0]
        for total in (inner_over_student, inner_over_teacher, weighted)
    )
    yield Check(
        name="teacher prefix, reverse KL: its gradient is E_{s ~ d^T, a ~ q}[-r grad log q]",
        error=apart(gradient, own),
    )
    yield Check(
        name="the same from the teacher's own tokens, with the weight q / p",
        error=apart(gradient, reweighted),
    )
    name = "the teacher's own tokens without the weight give another gradient"
    yield Check(name=name, error=apart(gradient, other), bound=DISTANCE, differs=True)
    for kind in ("forward", "reverse"):
        of_sequence = differences(student, lambda kind=kind: sequence_kl(kind, student, teacher))
        name = f"teacher prefix, reverse KL is not the gradient of the sequence {kind} KL"
        yield Check(name=name, error=apart(gradient, of_sequence), bound=DISTANCE, differs=True)


def _estimators(student: Table, teacher: Table) -> Iterator[Check]:
    _, reverse = trained(student, teacher, student, _options("student", "reverse"))
    _, forward = trained(student, teacher, student, _options("student", "forward"))
    sampled = {"signal": "sampled"}
    for estimator, baseline, expected, meaning in (
        ("k1", "none", reverse, "local reverse KL"),
        ("k1", "exact", reverse, "local reverse KL"),
        ("k2", "none", reverse, "local reverse KL"),
        ("k3", "none", forward, "local FORWARD KL"),
    ):
        kind = "forward" if estimator == "k3" else "reverse"
        options = _options("student", kind, **sampled, estimator=estimator)
        if estimator == "k1":
            options["baseline"] = baseline
        _, gradient = trained(student, teacher, student, options)
        used = "as a constant reward" if estimator == "k1" else "differentiated"
        used += ", exact baseline" if baseline == "exact" else ""
        yield Check(
            name=f"{estimator} {used}: expected gradient = {meaning}",
            error=apart(gradient, expected),
        )
    # d/dtheta of log q - log p at tokens that q drew: a sum of scores.
    k1 = score_sum(student, student, lambda text, t: 1.0)
    yield Check(
        name="k1 differentiated: expected gradient = 0", error=apart(k1, torch.zeros_like(k1))
    )


def _splits(student: Table, teacher: Table) -> Iterator[Check]:
    for kind, writer, prefix in (("forward", teacher, "teacher"), ("reverse", student, "student")):
        options = _options(prefix, kind)
        _, whole = trained(student, teacher, writer, options)
        _, equal = trained(student, teacher, writer, options | _split(1, (1.0, 1.0)))
        yield Check(
            name=f"split, {kind} KL: equal weights give the unsplit loss", error=apart(equal, whole)
        )
        for position in range(1, WINDOW):
            parts = []
            for weights in ((1.0, 0.0), (0.0, 1.0), (0.3, 1.7)):
                split = options | _split(position, weights)
                parts.append(trained(student, teacher, writer, split)[1])
            name = f"split at {position}, {kind} KL: w1 (tokens before) + w2 (tokens from it on)"
            yield Check(name=name, error=apart(parts[2], 0.3 * parts[0] + 1.7 * parts[1]))
            short = expectation(
                writer, lambda s, kind=kind: by_prefix(kind, student, teacher, s), True, position
            )
            (before,) = torch.autograd.grad(short, student.logits_SV)
            name = (
                f"split at {position}, {kind} KL: the tokens before it are a window of {position}"
            )
            yield Check(name=name, error=apart(parts[0], before))


def _split(position: int, weights: tuple[float, float]) -> dict[str, Any]:
    """Fields of an objective whose tokens before a position and from it on have these weights."""
    arguments = {"at": position, "before": weights[0], "after": weights[1]}
    return {"weights": "split", "weights_arguments": arguments}
