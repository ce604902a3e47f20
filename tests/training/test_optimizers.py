"""Optimisers of torchao: 8-bit moments and stochastic rounding, in whole runs. They compile their
step, which takes most of a minute."""

import sys
import warnings

import pytest
import torch
from conftest import interrupted_at, tiny_recipe
from safetensors.torch import load_file
from small_runs import FAST, rows_of, weights_of

import potstill
from potstill.config import RecipeError
from potstill.models.language_model import load_model


def recipe_of(out, dtype="float32", **train):
    sections = FAST | {"student": {"dtype": dtype}, "train": {"lr": 1e-4, **train}}
    return tiny_recipe(out, **sections)


def run(recipe):
    with warnings.catch_warnings():
        # Those of torchao and of the compiler.
        warnings.simplefilter("ignore")
        return potstill.train(recipe, quiet=True).folder


@pytest.mark.real
@pytest.mark.parametrize(
    ("dtype", "train"),
    [
        ("float32", {"optimizer": "adamw-8bit"}),
        ("bfloat16", {"optimizer": "adamw-8bit", "stochastic_rounding": True}),
        ("bfloat16", {"stochastic_rounding": True}),
    ],
)
def test_a_run_with_an_optimiser_of_torchao_resumes_to_the_bit(tmp_path, dtype, train):
    whole = run(recipe_of(tmp_path / "whole", dtype, **train))
    with interrupted_at(3):
        run(recipe_of(tmp_path / "stopped", dtype, **train))
    stopped = run(recipe_of(tmp_path / "stopped", dtype, **train))
    assert rows_of(whole) == rows_of(stopped)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(stopped)[name]), name
    if dtype != "float32":
        return
    # The first step, before a moment was packed, is AdamW's; moments take a byte a weight.
    one, other = (
        run(recipe_of(tmp_path / name, dtype, steps=1, warmup_steps=0, optimizer=name))
        for name in ("adamw", "adamw-8bit")
    )
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weights_of(other)[name], weight, rtol=1e-5, atol=1e-7)
    kept = load_file(other / "checkpoint/step-000001/optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in kept.values())


@pytest.mark.real
def test_stochastic_rounding_keeps_small_updates_in_the_mean(tmp_path):
    """Beside AdamW with float32 weights, from the same weights of bfloat16."""
    start = load_model("potstill:base", dtype="bfloat16")
    start.model.save_pretrained(tmp_path / "start")
    start.tokenizer.save_pretrained(tmp_path / "start")
    sums = {}
    for name, dtype, chance in (
        ("exact", "float32", False),
        ("rounded", "bfloat16", False),
        ("by chance", "bfloat16", True),
    ):
        train = {"lr": 1e-6, "steps": 10, "schedule": "constant", "warmup_steps": 0}
        train |= {"stochastic_rounding": True} if chance else {}
        student = {"model": str(tmp_path / "start"), "dtype": dtype}
        folder = run(tiny_recipe(tmp_path / name, **FAST | {"student": student, "train": train}))
        moved = [
            (weights_of(folder)[key].double() - weight.detach().double()).flatten()
            for key, weight in start.model.named_parameters()
            if key in weights_of(folder)
        ]
        sums[name] = torch.cat(moved)
    direction = sums["exact"].sign()
    along = {name: float((moved * direction).mean()) for name, moved in sums.items()}
    assert along["by chance"] == pytest.approx(along["exact"], rel=0.1)
    assert along["rounded"] < 0.5 * along["exact"]


def test_torchao_is_refused_where_it_is_missing_or_not_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(RecipeError, match=r"pip install 'potstill\[torchao\]'"):
        potstill.train(recipe_of(tmp_path / "run", optimizer="adamw-8bit"), quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="the weights that learn are in float32"):
        potstill.config.make_recipe({"train": {"stochastic_rounding": True}})
