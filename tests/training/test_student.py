"""Warnings about the student that is trained: dropout, coarse weights, routers, positions."""

from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from odd_models import make_tiny, make_tokenizer, write_folder

import potstill
from potstill.config import Evaluation, Sampling
from potstill.evaluation.scores import prepare_problems
from potstill.models.distributed import World
from potstill.models.language_model import ModelError
from potstill.models.probe import ready
from potstill.models.sampling import sample
from potstill.models.weights import cautions, share_that_moves
from potstill.runs import run_folder
from potstill.teachers.rope import refuse_crossing
from potstill.teachers.sharded import ShardedTeacher
from potstill.training.setup import compute_dtype_of

GPT2: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512}
DROPS: dict[str, Any] = {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3}
BORDER = 16
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 16.0,
    "original_max_position_embeddings": BORDER,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer()


@pytest.mark.parametrize("dropout", [False, True])
def test_a_model_that_teaches_itself_learns_nothing_without_dropout(tok, tmp_path, dropout):
    recipe = tiny_recipe(
        tmp_path / "run",
        objective={"prefix": "student", "kl": "reverse"},
        student={"dropout": dropout},
        teacher={"model": "self"},
        window={"tokens": 8},
        train={"steps": 1, "prompts_per_step": 4},
    )
    student = make_tiny(tok, "gpt2", **(GPT2 | DROPS))
    potstill.train(
        recipe, student=student, tokenizer=tok, prompts=["The", "loss", "is", "one"], quiet=True
    )
    (row,) = run_folder.read_rows(tmp_path / "run/metrics.jsonl")
    assert row["loss"] > 0.05 if dropout else abs(row["loss"]) < 1e-6
    assert abs(row["reverse_kl"] - row["loss"]) < 1e-6
    # Logged rollouts are of the student that wrote, which is its teacher still.
    samples = run_folder.read_rows(tmp_path / "run/samples.jsonl")
    assert len(samples) == 2 and all(abs(kl) < 1e-4 for row in samples for kl in row["forward_kl"])


@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_the_share_of_bfloat16_weights_that_a_step_moves_is_that_of_adam(lr):
    """The first step of Adam is the learning rate. (A power of two has a nearer neighbour below
    it.)"""
    torch.manual_seed(0)
    weight = torch.nn.Parameter((torch.randn(200, 100) * 0.05).bfloat16())
    with torch.no_grad():
        weight[0, :5] = 0
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr, weight_decay=0.0)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    moved = (weight.detach() != before).float().mean().item()
    assert share_that_moves([weight.detach().copy_(before)], lr) == pytest.approx(moved, abs=0.01)
    assert share_that_moves([before.float()], lr) == 1


def test_coarse_weights_and_routers_are_said(tok, tmp_path, capsys):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    student = make_tiny(tok, "qwen3_moe", **experts, router_aux_loss_coef=0.25).bfloat16()
    recipe = tiny_recipe(
        tmp_path / "run",
        window={"tokens": 4},
        train={"steps": 1, "lr": 1e-6, "prompts_per_step": 1},
    )
    potstill.train(
        recipe, student=student, teacher=make_tiny(tok, seed=1), tokenizer=tok, prompts=["The"]
    )
    said = " ".join(capsys.readouterr().err.split())
    share = share_that_moves(make_tiny(tok, "qwen3_moe", **experts).bfloat16().parameters(), 1e-6)
    assert share < 0.1 and f"a step of 1e-06 can change {share:.2%} of them" in said
    assert 'use student.dtype = "float32" with train.compute_dtype = "bfloat16"' in said
    assert "load-balancing loss (router_aux_loss_coef = 0.25) is not part of the loss" in said
    assert cautions(make_tiny(tok), 1e-6) == []
    assert cautions(make_tiny(tok).bfloat16(), 1.0) == []


def test_rows_of_longrope_stay_on_one_side_of_the_border(tok, tmp_path):
    """Else a row depends on its neighbours, which is shown first."""
    tiny = make_tiny(tok, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=BORDER)
    model = ready(tiny, tok)
    short, long = tuple(range(10, 16)), tuple(range(10, 30))

    def written(*prompts):
        seeds = [(i,) for i in range(len(prompts))]
        return sample(tiny, prompts, seeds, max_tokens=6, end_ids=(), sampling=Sampling())[0]

    assert written(short).log_probs != pytest.approx(written(short, long).log_probs, abs=1e-3)
    assert written(short).log_probs == pytest.approx(
        written(short, (*short, 40)).log_probs, abs=1e-5
    )
    assert written(long).log_probs == pytest.approx(written(long, (*long, 40)).log_probs, abs=1e-5)
    for prompts, num in (([short], 11), ([short, (*short, 40)], 10), ([long, long], 400), ([], 1)):
        refuse_crossing(model, prompts, num, "window.tokens")
    for prompts, num in (([short], 12), ([short, long], 1), ([short, (*short, 40)], 11)):
        with pytest.raises(
            ModelError, match=r"longrope.*in one way up to 16 tokens.*lower window.tokens"
        ):
            refuse_crossing(model, prompts, num, "window.tokens")
    unwritable = ShardedTeacher(tiny, tok, "sharded", World(0, 1, torch.device("cpu")))
    with pytest.raises(ModelError, match=r"'sharded' .*longrope"):
        refuse_crossing(unwritable, [short, long], 1, "window.tokens")
    plain = ready(make_tiny(tok), tok)
    refuse_crossing(plain, [short, long], 100, "window.tokens")
    objects = {
        "student": tiny,
        "teacher": make_tiny(tok),
        "tokenizer": tok,
        "prompts": ["The", "loss"],
        "quiet": True,
    }
    with pytest.raises(ModelError, match=r"lower window\.tokens"):
        potstill.train(tiny_recipe(tmp_path / "run", window={"tokens": 24}), **objects)
    objects |= {"student": make_tiny(tok), "teacher": tiny}
    with pytest.raises(ModelError, match=r"lower window\.tokens"):
        potstill.train(tiny_recipe(tmp_path / "run", window={"tokens": 24}), **objects)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModelError, match=r"lower evaluation\.max_tokens"):
        prepare_problems(model, Evaluation(source="multiplication", num_problems=2, max_tokens=24))


def test_a_checkpoint_in_bfloat16_computes_in_it_where_the_device_is_made_for_it(tok, tmp_path):
    half = str(write_folder(tmp_path / "half", tok, make_tiny(tok).bfloat16()))
    whole = str(write_folder(tmp_path / "whole", tok, make_tiny(tok)))
    gpu, cpu = (World(0, 1, torch.device(kind)) for kind in ("cuda", "cpu"))
    for model, chosen, world, wanted in (
        (half, {}, gpu, "bfloat16"),
        (half, {}, cpu, "float32"),
        (whole, {}, gpu, "float32"),
        (half, {"compute_dtype": "float32"}, gpu, "float32"),
        (whole, {"compute_dtype": "bfloat16"}, cpu, "bfloat16"),
    ):
        recipe = tiny_recipe(tmp_path / "run", student={"model": model}, train=chosen)
        assert compute_dtype_of(recipe, world, None) == wanted
    recipe = tiny_recipe(tmp_path / "run", student={"model": half})
    assert compute_dtype_of(recipe, gpu, make_tiny(tok)) == "float32"
