"""`potstill verify`: every identity holds, and a mistake in any one formula shows."""

import json

import pytest
import torch
from conftest import make_model
from sampled import some

from potstill.cli.app import main
from potstill.cli.show import print_checks
from potstill.kl import definition, tiles
from potstill.kl.terms import LossTerms
from potstill.objectives import loss as loss_module
from potstill.objectives import tokens as tokens_module
from potstill.objectives.loss import Loss
from potstill.rollouts import batching
from potstill.theory.check import BOUND
from potstill.theory.identities import identities
from potstill.theory.real_model import check_model


def test_all_hold_with_every_error_below_the_bound(capsys, tmp_path):
    main(["verify", "--json", str(tmp_path / "out/checks.json")])
    rows = json.loads((tmp_path / "out/checks.json").read_text())
    assert len(rows) >= 100 and all(row["holds"] for row in rows)
    equal = [row for row in rows if not row["differs"]]
    assert all(row["error"] <= row["bound"] == BOUND == 1e-8 for row in equal)
    assert all(row["error"] > 0.04 for row in rows if row["differs"])
    out = capsys.readouterr().out
    assert f"all {len(rows)} hold" in out and "chain rule" in out


def wrong_closed_form(name, change):
    def mutate(monkeypatch):
        real = definition.DIVERGENCES[name]

        def wrong(ls, lt, weight):
            return change(*real(ls, lt, weight), ls.exp(), lt.exp())

        monkeypatch.setitem(definition.DIVERGENCES, name, wrong)

    return mutate


def wrong_tile(monkeypatch):
    """The fused gradient without the mean of the log-ratio: q (log q - log p) alone."""
    real = tiles.tile_gradient

    def wrong(z, y, sums, coefficients, terms, mixture_weight, scratch=()):
        if coefficients is not None and terms.reverse:
            coefficients = coefficients.clone()
            coefficients[5] = 0
        return real(z, y, sums, coefficients, terms, mixture_weight, scratch)

    monkeypatch.setattr(tiles, "tile_gradient", wrong)


def wrong_returns(monkeypatch):
    """Discounted twice. (To count a token's own KL too would be right: it is a baseline.)"""
    real = loss_module.returns_to_go
    monkeypatch.setattr(
        loss_module, "returns_to_go", lambda kl, batch, gamma: real(kl, batch, gamma**2)
    )


def wrong_split(monkeypatch):
    """The token at the split counts to the part before it."""
    real = tokens_module.positions
    monkeypatch.setattr(tokens_module, "positions", lambda batch: (real(batch) - 1).clamp(min=0))


def wrong_estimator(old, new):
    def mutate(monkeypatch):
        real = loss_module.token_slope

        def wrong(stats, objective):
            if objective.estimator == old:
                objective = objective.model_copy(update={"estimator": new})
            return real(stats, objective)

        monkeypatch.setattr(loss_module, "token_slope", wrong)

    return mutate


def wrong_k1(monkeypatch):
    """k1 differentiated as a loss, which is zero in expectation."""
    real = loss_module.token_slope

    def wrong(stats, objective):
        slope_N = real(stats, objective)
        return torch.ones_like(slope_N) if objective.estimator == "k1" else slope_N

    monkeypatch.setattr(loss_module, "token_slope", wrong)


def wrong_terms(monkeypatch):
    """lambda, the reverse weight of the paper, taken for the forward weight."""
    real = Loss.terms

    def wrong(self):
        terms = real(self)
        return (
            LossTerms(forward=terms.reverse, reverse=terms.forward)
            if self.objective.kl == "mixed"
            else terms
        )

    monkeypatch.setattr(Loss, "terms", wrong)


def wrong_shift(monkeypatch):
    """The loss looks at each token's own position instead of the one before it."""
    real = batching._lay_out

    def wrong(rollouts, who, device):
        inputs, _, mask = real(rollouts, who, device)
        return inputs, inputs, mask

    monkeypatch.setattr(batching, "_lay_out", wrong)


def wrong_mixture(monkeypatch):
    """m with the weights of both models exchanged."""
    real = tiles.log_mixture
    monkeypatch.setattr(tiles, "log_mixture", lambda ls, lt, weight: real(ls, lt, 1 - weight))


MUTATIONS = {
    "forward KL: p - q": (wrong_closed_form("forward", lambda v, g, q, p: (v, -g)), "forward"),
    "reverse KL: without q": (
        wrong_closed_form("reverse", lambda v, g, q, p: (v, g / q)),
        "reverse",
    ),
    "mixed: value of the forward KL": (
        wrong_closed_form("mixed", lambda v, g, q, p: ((p * (p / q).log()).sum(-1), g)),
        "mixed",
    ),
    "JSD: without 1 - b": (wrong_closed_form("jsd", lambda v, g, q, p: (v, g / 0.7)), "jsd"),
    "skew-forward: a tenth off": (
        wrong_closed_form("skew-forward", lambda v, g, q, p: (v, 1.1 * g)),
        "skew-forward",
    ),
    "skew-reverse: value shifted": (
        wrong_closed_form("skew-reverse", lambda v, g, q, p: (v + 1e-6, g)),
        "skew-rev",
    ),
    "fused reverse KL: not centred": (wrong_tile, "reverse-KL gradient = policy gradient"),
    "fused mixture: weights exchanged": (wrong_mixture, "jsd"),
    "returns: discounted twice": (wrong_returns, "gamma = 0.5"),
    "split: one token late": (wrong_split, "split at"),
    "k1 differentiated": (wrong_k1, "k1"),
    "k3 for k2": (wrong_estimator("k2", "k3"), "k2"),
    "k2 for k3": (wrong_estimator("k3", "k2"), "k3"),
    "forward weight for reverse": (wrong_terms, "mixed"),
    "targets not shifted": (wrong_shift, "k2"),
}


@pytest.mark.parametrize("name", some([(name,) for name in MUTATIONS], every=3))
def test_a_mistake_in_any_one_formula_shows(monkeypatch, name, capsys):
    mutate, where = MUTATIONS[name]
    mutate(monkeypatch)
    seen = []
    # Only as far as it takes: all that follow would cost seconds and show nothing more.
    for check in identities():
        seen.append(check)
        if where in check.name and not check.holds:
            break
    broken = [check.name for check in seen if not check.holds]
    assert any(where in each for each in broken), broken
    assert not print_checks(seen)
    assert f"{len(broken)} of {len(seen)} are broken" in capsys.readouterr().out


def test_a_real_model(capsys):
    main(["verify", "--model", "potstill:base"])
    out = capsys.readouterr().out
    assert "all 10 hold" in out and "23 of 23 rows" in out


def test_a_real_model_with_a_wrong_formula(monkeypatch):
    wrong_tile(monkeypatch)
    broken = [check.name for check in check_model(make_model()) if not check.holds]
    assert any(
        name.startswith("reverse: value and gradient by definition (fused)") for name in broken
    )
    with pytest.raises(SystemExit) as error:
        main(["verify", "--model", "potstill:base"])
    assert error.value.code == 1


def test_bad_input(capsys):
    with pytest.raises(SystemExit) as error:
        main(["verify", "--model", "no/where"])
    assert error.value.code == 2
    assert "'no/where' is not here nor in the hub's cache" in capsys.readouterr().err
