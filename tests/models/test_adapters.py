"""Adapters (LoRA): the base, the gradient, merging, folders, and runs that train one."""

import json
import re
import shutil
import sys
import warnings

import peft
import pytest
import torch
from conftest import interrupted_at, make_model, make_rollout, tiny_recipe
from safetensors.torch import load_file
from small_runs import assert_same_run, rows_of
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import potstill
from potstill.cli.app import main
from potstill.cli.app import run as run_command
from potstill.cli.usage import UsageError
from potstill.config import Lora, RecipeError
from potstill.kl.definition import token_divergence
from potstill.models import adapters
from potstill.models.base_alone import BaseAlone
from potstill.models.flops import training_flops
from potstill.models.language_model import ModelError, fingerprint, load_model
from potstill.models.probe import probe, ready
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.rollouts.batching import make_batch
from potstill.training import setup

IDS = torch.arange(20)[None]
LORA = {"lora": {"rank": 4}}


def trained(lora: Lora | None = None, **options):
    """A model with an adapter that is not zero."""
    model = make_model(**options)
    adapters.attach(model.model, lora or Lora(rank=4), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.model(input_ids=IDS).logits


def test_a_fresh_adapter_and_one_that_is_off_are_the_base_to_the_bit():
    base, model = make_model(), make_model()
    adapters.attach(model.model, Lora(rank=4, dropout=0.5), seed=0)
    assert torch.equal(logits(model), logits(base))
    model = trained(Lora(rank=4, dropout=0.5))
    alone = BaseAlone(model.model, model.tokenizer, "self")
    assert not torch.allclose(logits(model), logits(base), atol=1e-2)
    model.train()
    assert torch.equal(alone(IDS), base(IDS))
    assert torch.equal(alone.decoder(input_ids=IDS).logits, logits(base))
    assert alone.weights_digest() == fingerprint(base)
    # The student is as it was: in its mode, with its adapter, which alone may change.
    assert model.model.training
    model.eval()
    assert not torch.allclose(logits(model), logits(base), atol=1e-2)
    assert all(w.requires_grad == ("lora_" in name) for name, w in model.named_parameters())


def test_the_gradient_is_that_of_the_written_out_formula():
    """W + alpha / rank B A in place of each W, in float64, by autograd of whole logits."""
    model, teacher = trained(), make_model(hidden_size=24, seed=1)
    batch = make_batch([make_rollout([1, 5, 6, 7], [8, 9, 10, 2])], torch.device("cpu"))
    loss = Loss(
        objective=potstill.Objective(prefix="student", kl="reverse"),
        reward=potstill.Reward(),
        normalize="token",
    )
    alone = BaseAlone(model.model, model.tokenizer, "self")
    signal = teacher_signal(teacher, batch, loss)
    hidden_ND = model(batch.input_ids_BT)[batch.loss_mask_BT]
    # The base passes in the midst of a step, between the student's two passes.
    alone(batch.input_ids_BT)
    loss_sum, _, _ = batch_loss(model, teacher, signal, batch, loss, hidden_ND=hidden_ND)
    loss_sum.backward()

    base = make_model().double()
    narrow = {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in adapters.adapted(model.model)
    }
    assert len(narrow) == 2 * 7
    exact = {n: [w.detach().double().requires_grad_() for w in pair] for n, pair in narrow.items()}
    weights = dict(base.model.named_parameters())
    weights |= {f"{n}.weight": weights[f"{n}.weight"] + 8 * b @ a for n, (a, b) in exact.items()}
    whole = functional_call(base.model, weights, kwargs={"input_ids": batch.input_ids_BT})
    theirs = teacher.double().model(input_ids=batch.input_ids_BT).logits
    mine_NV, theirs_NV = (x[batch.loss_mask_BT] for x in (whole.logits, theirs.detach()))
    token_divergence(mine_NV, theirs_NV, "reverse")[0].sum().backward()
    for name, pair in narrow.items():
        for mine, wanted in zip(pair, exact[name], strict=True):
            torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_the_adapter_to_rounding_and_the_written_out_sum(dtype):
    model = make_model()
    model.model.to(dtype)
    adapters.attach(model.model, Lora(rank=4), seed=0)
    for name, weight in model.named_parameters():
        assert weight.dtype == (torch.float32 if "lora_" in name else dtype)
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    before, weights = logits(model), adapters.merged_weights(model.model)
    layer = model.model.model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    wanted = layer.base_layer.weight.double() + 8 * b @ a
    named = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(weights[named].double(), wanted, rtol=1e-2, atol=1e-2)
    adapters.merge_in_place(model.model)
    assert not adapters.has_adapter(model.model)
    assert weights.keys() == dict(model.model.named_parameters()).keys()
    for name, weight in model.model.named_parameters():
        assert torch.equal(weight, weights[name]) and weight.requires_grad, name
    share = 3e-2 if dtype == torch.bfloat16 else 1e-6
    assert (logits(model) - before).abs().max() <= share * before.abs().max()


def test_a_student_with_an_adapter_passes_the_probe_and_counts_what_learns():
    model, base = trained(), make_model()
    probe(model)
    rollout = make_rollout([1, 5, 6], [7, 8, 2])
    (mine, whole) = (training_flops([rollout], m.flops, None) for m in (model, base))
    # Weights that stay have no gradient of their own: a third of the passes of their products, and
    # the tied head's.
    num_read = 5
    frozen = sum(2 * w.numel() for n, w in base.model.named_parameters() if "proj" in n)
    of_adapter = sum(2 * w.numel() for w in model.parameters() if w.requires_grad)
    both = "student_forward", "student_backward"
    added = num_read * (3 * of_adapter - frozen)
    assert sum(mine[p] for p in both) == sum(whole[p] for p in both) + added
    assert mine["head"] == whole["head"] * 2 // 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One recipe with the whole model saved, and with the adapter alone."""
    folder = tmp_path_factory.mktemp("lora")
    for save in ("merged", "adapter"):
        student = {"lora": {"rank": 4, "save": save}}
        recipe = tiny_recipe(folder / save, student=student, window={"tokens": 8})
        potstill.train(recipe, quiet=True)
    return folder


def test_both_ways_to_save_are_one_model_that_others_read_too(runs):
    merged, adapter = (load_model(str(runs / save)) for save in ("merged", "adapter"))
    for (name, a), b in zip(
        merged.model.named_parameters(), adapter.model.parameters(), strict=True
    ):
        assert torch.equal(a, b) and b.requires_grad, name
    assert merged.end_ids == adapter.end_ids
    assert not torch.allclose(logits(merged), logits(load_model("potstill:base")), atol=1e-3)
    settings = json.loads((runs / "adapter/model/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 32)
    assert settings["target_modules"] == sorted(settings["target_modules"])
    # By the libraries that the folders are written for.
    plain = AutoModelForCausalLM.from_pretrained(runs / "merged/model")
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(base, str(runs / "adapter/model"))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, logits(merged))
        torch.testing.assert_close(
            theirs(input_ids=IDS).logits, logits(merged), rtol=1e-4, atol=1e-4
        )
    names = {path.name for path in (runs / "adapter/model").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    small = load_file(runs / "adapter/checkpoint/step-000004/model.safetensors")
    whole = load_file(runs / "merged/model/model.safetensors")
    assert all("lora_" in name for name in small) and "lora_" not in "".join(whole)
    assert rows_of(runs / "adapter") == rows_of(runs / "merged")


def test_an_adapter_is_merged_by_a_command(runs, tmp_path, capsys):
    out = tmp_path / "new/whole"
    main(["merge", str(runs / "adapter"), "--out", str(out)])
    assert f"the whole model is in {out}" in "".join(capsys.readouterr())
    mine, run = (load_file(f / "model.safetensors") for f in (out, runs / "merged/model"))
    assert mine.keys() == run.keys() and all(torch.equal(mine[name], run[name]) for name in run)
    assert load_model(str(out)).end_ids == load_model(str(runs / "merged")).end_ids
    for model, message in (("merged", "is whole already"), ("adapter", "is there already")):
        with pytest.raises(UsageError, match=message):
            run_command(["merge", str(runs / model), "--out", str(out)])


def test_an_adapter_is_a_student_and_a_teacher(runs, tmp_path, capsys):
    """Loaded by its folder; trained on by an adapter of its own, whose base has no folder."""
    folder = str(runs / "adapter/model")
    sections = {"student": {"model": folder, **LORA}, "teacher": {"model": folder}}
    recipe = tiny_recipe(tmp_path / "run", **sections, train={"steps": 1}, window={"tokens": 8})
    potstill.train(recipe)
    assert rows_of(tmp_path / "run")[0]["reverse_kl"] == pytest.approx(0, abs=1e-6)
    said = "".join(capsys.readouterr())
    assert re.search(r"adapter of rank 4, alpha 32, beside 14 matrices: 8,192 of 83,776 ", said)
    student = {"model": folder, "lora": {"rank": 4, "save": "adapter"}}
    with pytest.raises(ModelError, match="names the folder or hub id of its base"):
        potstill.train(tiny_recipe(tmp_path / "other", student=student), quiet=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(runs, tmp_path, save):
    recipe = tiny_recipe(
        tmp_path / save, student={"lora": {"rank": 4, "save": save}}, window={"tokens": 8}
    )
    with interrupted_at(3):
        potstill.train(recipe, quiet=True)
    potstill.train(recipe, quiet=True)
    assert rows_of(tmp_path / save) == rows_of(runs / save)
    name = "checkpoint/step-000004/model.safetensors"
    mine, whole = load_file(tmp_path / save / name), load_file(runs / save / name)
    assert mine.keys() == whole.keys()
    assert all(torch.equal(weight, whole[key]) for key, weight in mine.items())


def test_the_base_alone_is_the_teacher_and_the_start_as_a_second_copy_is(tmp_path, monkeypatch):
    """teacher.model = "self" and the KL to the start, beside copies of the model; a reward moves
    the student away from both."""
    judge = tmp_path / "judge.py"
    judge.write_text("def score(examples, texts):\n    return [float('1' in t) for t in texts]\n")
    sections = {
        "student": LORA,
        "objective": {"prefix": "student", "kl": "reverse"},
        "reward": {"weight": 1.0, "group_size": 2, "start_kl": 0.5, "source": f"{judge}:score"},
        "window": {"tokens": 8},
        "validation": {"num_prompts": 4},
    }
    shared = tiny_recipe(tmp_path / "shared", teacher={"model": "self"}, **sections)
    copied = tiny_recipe(tmp_path / "copied", teacher={"model": "potstill:base"}, **sections)
    potstill.train(shared, quiet=True)
    monkeypatch.setattr(setup, "as_it_is", lambda student, name, _: load_model("potstill:base"))
    potstill.train(copied, quiet=True)
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert rows_of(tmp_path / "shared", name) == rows_of(tmp_path / "copied", name)
    last = rows_of(tmp_path / "shared")[-1]
    assert last["start_kl"] == pytest.approx(last["reverse_kl"]) and last["start_kl"] > 1e-4


def test_a_teacher_that_follows_an_adapter_resumes_to_the_bit(tmp_path):
    sections = {"teacher": {"model": "self", "refresh_steps": 1}, "student": LORA}
    sections |= {"window": {"tokens": 8}, "train": {"checkpoint_every": 1}}
    whole, stopped = (tiny_recipe(tmp_path / name, **sections) for name in ("whole", "stopped"))
    potstill.train(whole, quiet=True)
    with interrupted_at(3):
        potstill.train(stopped, quiet=True)
    potstill.train(stopped, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    kept = load_file(tmp_path / "whole/checkpoint/step-000004/teacher.safetensors")
    assert all("lora_" in name for name in kept)


def test_an_object_in_both_roles_is_taught_by_its_base(tmp_path):
    model = make_model()
    recipe = tiny_recipe(tmp_path / "run", student=LORA, train={"steps": 2}, window={"tokens": 8})
    result = potstill.train(recipe, student=model, teacher=model, quiet=True)
    assert rows_of(tmp_path / "run")[0]["reverse_kl"] == pytest.approx(0, abs=1e-6)
    assert result.student.model is model.model and not adapters.has_adapter(model.model)


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path, forks):
    train = {"steps": 2, "lr": 1e-4, "checkpoint_every": 2, "tokens_per_batch": 128}
    sections = {"student": LORA, "teacher": {"model": "self"}, "reward": {"start_kl": 0.5}}
    recipe = tiny_recipe(tmp_path / "run", **sections, train=train, window={"tokens": 16})
    (tmp_path / "recipe.toml").write_text(potstill.config.to_toml(recipe.resolved()))
    one = forks.run(tmp_path, ["train", "recipe.toml", "--out", "one"])
    two = forks.run_ranks(tmp_path, ["train", "recipe.toml", "--out", "two"], num_ranks=2)
    assert one.code == two.code == 0, one.err + two.err
    for a, b in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        for key in ("loss", "reverse_kl", "start_kl", "student_entropy", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-7), key
    for name in ("checkpoint/step-000002/model.safetensors", "model/model.safetensors"):
        mine, theirs = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
        assert mine.keys() == theirs.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=1e-6)


def no_base(folder):
    (folder / "adapter_config.json").write_text("{}")


def of_nothing(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "./gone"}')


def broken(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": ')


def of_another(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "potstill:teacher"
    (folder / "adapter_config.json").write_text(json.dumps(config))


def without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


FAULTS = {
    no_base: "names no model that the adapter is of",
    of_nothing: "model folder './gone' does not exist",
    broken: "adapter_config.json' is damaged",
    of_another: "cannot be loaded: .*size mismatch",
    without_weights: "cannot be loaded: ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(runs, tmp_path, fault):
    folder = shutil.copytree(runs / "adapter/model", tmp_path / "adapter")
    ready(folder)
    fault(folder)
    with pytest.raises(ModelError, match=FAULTS[fault]) as caught:
        ready(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4, "targets": ["q_porj"]}, "'q_porj', which ends no .* has .*q_proj"),
        ({"rank": 4, "targets": ["q_proj", "nothing"]}, "names 'nothing', which ends no linear"),
        ({"rank": 4, "targets": ["lm_head"]}, "'lm_head', which is the head.* has down_proj"),
        ({"rank": 4, "targets": ["embed_tokens"]}, "'embed_tokens', which ends no"),
    ],
)
def test_targets_that_are_none_are_refused_in_one_line(tmp_path, lora, message):
    with pytest.raises(ModelError, match=message) as caught:
        potstill.train(tiny_recipe(tmp_path / "run", student={"lora": lora}), quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_fields_that_no_adapter_reads_are_refused():
    for student, message in (
        ({"lora": {"alpha": 8}}, "student.lora.alpha is set but not read: student.lora.rank"),
        ({"lora": {"rank": 4, "dropout": 0.1}}, "not read: student.dropout is false"),
        ({"lora": {"rank": 4}, "init": "random"}, "fresh weights would stay as they were drawn"),
        ({"lora": {"rank": 4, "targets": []}}, "targets is empty"),
        ({"lora": {"rnk": 4}}, "the nearest is student.lora.rank"),
    ):
        with pytest.raises(RecipeError, match=message):
            potstill.config.make_recipe({"student": student})


def test_without_peft_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'potstill\[lora\]'"):
        potstill.train(tiny_recipe(tmp_path / "run", student=LORA), quiet=True)
    assert not (tmp_path / "run").exists()
