"""Operations counted from the architecture, against PyTorch's own counter on the models' own
forward passes."""

import pytest
import torch
from conftest import interrupted_at, make_model, make_rollout, tiny_recipe
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import potstill
from potstill.config import make_recipe
from potstill.models.character_tokenizer import build_tokenizer
from potstill.models.flops import rollout_flops, training_flops
from potstill.models.language_model import LanguageModel
from potstill.runs import run_folder
from potstill.training.rates import is_spent, learning_rate


def gpt2() -> LanguageModel:
    config = GPT2Config(
        vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=2
    )
    return LanguageModel(GPT2LMHeadModel(config).eval(), build_tokenizer(), "gpt2")


@pytest.mark.parametrize("make", [make_model, gpt2], ids=["qwen3", "gpt2"])
@pytest.mark.parametrize("num_tokens", [1, 7, 30])
def test_a_forward_pass_is_what_pytorch_counts(make, num_tokens):
    """Attention written out, as the counter does not know the fused kind; it then takes all pairs,
    causal or not."""
    model = make()
    model.model.set_attn_implementation("eager")
    flops = model.flops
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=torch.ones(1, num_tokens, dtype=torch.long), use_cache=False)
    all_pairs = flops.per_token * num_tokens + flops.per_pair * num_tokens**2
    assert counter.get_total_flops() == all_pairs + num_tokens * flops.head
    causal = sum(flops.per_token + flops.per_pair * (i + 1) for i in range(num_tokens))
    assert flops.backbone(num_tokens) == causal


def test_parts_by_hand(student, teacher):
    s, t = student.flops, teacher.flops
    # Three tokens of prompt and four of completion, of which two are loss tokens: six go in.
    rollout = make_rollout(
        [1, 5, 6], [9, 5, 3, 2], trained=[False, True, False, True], writer="teacher"
    )
    assert training_flops([rollout], s, t) == {
        "rollout": 0,
        "probe": 0,
        "teacher": t.backbone(6),
        "student_forward": s.backbone(6),
        "student_backward": 2 * s.backbone(6),
        "head": 6 * s.head + 2 * t.head,
    }
    assert training_flops([rollout], s, None)["teacher"] == 0
    models = {"student": s, "teacher": t}
    assert rollout_flops([rollout], models, by_token=False) == t.backbone(6) + 4 * t.head
    handoff = make_rollout([1, 5, 6], [9, 5, 3, 2])
    object.__setattr__(handoff, "writers", ("teacher", "student", "student", "student"))
    expected = t.backbone(3) + t.head + s.backbone(6) + 3 * s.head
    assert rollout_flops([handoff], models, by_token=False) == expected
    assert rollout_flops([handoff], models, by_token=True) == t.backbone(6) + s.backbone(6) + 4 * (
        t.head + s.head
    )
    assert rollout_flops([make_rollout([1], [2], writer="dataset")], models, by_token=False) == 0


def test_a_budget_of_operations_ends_a_run_and_survives_a_resume(tmp_path):
    whole = potstill.train(tiny_recipe(tmp_path / "steps"), quiet=True)
    rows = run_folder.read_rows(tmp_path / "steps/metrics.jsonl")
    assert (
        rows[-1]["total_flops"]
        == sum(sum(row["flops"].values()) for row in rows)
        == whole.metrics["total_flops"]
    )
    assert all((value > 0) == (part != "probe") for part, value in rows[0]["flops"].items())

    # The operations of three steps and a half: the fourth is the last.
    flops = rows[2]["total_flops"] + sum(rows[3]["flops"].values()) / 2

    def recipe(name):
        return tiny_recipe(
            tmp_path / name, train={"steps": 50, "flops": flops, "schedule": "constant"}
        )

    potstill.train(recipe("flops"), quiet=True)
    of_flops = run_folder.read_rows(tmp_path / "flops/metrics.jsonl")
    assert len(of_flops) == 4 and of_flops[-1]["total_flops"] >= flops > of_flops[-2]["total_flops"]

    with interrupted_at(3):
        potstill.train(recipe("stopped"), quiet=True)
    potstill.train(recipe("stopped"), quiet=True)
    stopped = run_folder.read_rows(tmp_path / "stopped/metrics.jsonl")
    assert [row["total_flops"] for row in stopped] == [row["total_flops"] for row in of_flops]
    assert [row["loss"] for row in stopped] == [row["loss"] for row in of_flops]


def test_the_schedule_goes_by_what_is_nearer():
    config = make_recipe(
        {"train": {"steps": 1001, "flops": 100.0, "warmup_steps": 1, "lr": 1.0}}
    ).train
    rates = [learning_rate(config, 1 + i, spent) for i, spent in enumerate((0, 25, 50, 75, 100))]
    assert rates == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])
    assert learning_rate(config, 501, 25) == pytest.approx(0.5)
    assert is_spent(config, 1001, 0)
    assert is_spent(config, 3, 100)
    assert not is_spent(config, 3, 99)
