"""Adapters beside quantised weights (QLoRA): the base stays what it is to the bit, and the adapter
has the gradients that it would have beside the values that the codes stand for."""

import pytest
import torch
import transformers
from conftest import interrupted_at, tiny_recipe
from quantised import KINDS, without_their_warnings, write_quantised, write_whole
from safetensors.torch import load_file
from small_runs import rows_of

import potstill
from potstill.cli.app import main
from potstill.config import Lora, RecipeError
from potstill.models import adapters
from potstill.models.language_model import fingerprint, load_model
from potstill.models.lean.quantized import is_quantized, make_whole
from potstill.models.probe import ready
from potstill.planning.plan import pair_of

pytestmark = pytest.mark.real
IDS = torch.arange(16)[None]
LORA = {"rank": 4, "save": "adapter"}
# torchao multiplies by a row's scale after the product.
NEAR = {"int8": 1e-2, "nf4": 1e-5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "whole"
    write_whole(folder)
    return folder


@pytest.fixture(scope="module", params=NEAR)
def quantised(request, whole):
    return request.param, write_quantised(whole, request.param)


def recipe_of(out, folder, **sections):
    base = {
        "student": {"model": str(folder), "lora": LORA},
        "objective": {"prefix": "student", "kl": "reverse"},
        "teacher": {"model": "potstill:stops-teacher"},
        "window": {"tokens": 12},
        "train": {"steps": 4, "lr": 1e-2, "warmup_steps": 0, "checkpoint_every": 1},
    }
    return tiny_recipe(out, **base | sections)


def with_an_adapter(folder, *, dense=False):
    model = load_model(str(folder))
    if dense:
        make_whole(model.model)
    adapters.attach(model.model, Lora(rank=4), 0)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    return model


def near(found, wanted, share):
    assert (found - wanted).norm() <= share * wanted.norm()


def test_the_base_stays_to_the_bit(quantised):
    _, folder = quantised
    with without_their_warnings():
        model = ready(str(folder))
        with torch.no_grad():
            base = model(IDS)
        adapters.attach(model.model, Lora(rank=4), 0)
        learning = [weight for weight in model.parameters() if weight.requires_grad]
        assert {weight.dtype for weight in learning} == {torch.float32}
        with torch.no_grad():
            assert torch.equal(model(IDS), base)
        optimizer = torch.optim.AdamW(learning, lr=1e-2, fused=True)
        for _ in range(2):
            model(IDS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            assert (model(IDS) - base).abs().max() > 1e-3
            with adapters.adapter_off(model.model):
                assert torch.equal(model(IDS), base)


def test_gradients_are_those_beside_the_values_of_the_codes(quantised):
    kind, folder = quantised
    found = {}
    with without_their_warnings():
        for dense in (False, True):
            model = with_an_adapter(folder, dense=dense)
            states = model(IDS)
            states.square().mean().backward()
            grads = [weight.grad for weight in model.parameters() if weight.requires_grad]
            found[dense] = [states.detach(), *grads]
    assert len(found[True]) == 1 + 2 * 14
    for mine, theirs in zip(found[False], found[True], strict=True):
        near(mine, theirs, NEAR[kind])


def test_a_run_resumes_to_the_bit_and_saves_the_adapter(quantised, tmp_path, capsys):
    kind, folder = quantised
    with without_their_warnings():
        potstill.train(recipe_of(tmp_path / "whole", folder))
        said = capsys.readouterr().err
        halves = recipe_of(tmp_path / "halves", folder)
        with interrupted_at(2):
            potstill.train(halves, quiet=True)
        potstill.train(halves, quiet=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert rows_of(tmp_path / "whole", name) == rows_of(tmp_path / "halves", name)
        files = [
            tmp_path / name / "model/adapter_model.safetensors" for name in ("whole", "halves")
        ]
        one, other = map(load_file, files)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        assert f"the student's weights are quantised ({KINDS[kind][0]}" in said
        assert "beside 14 matrices" in said
        kept = load_file(tmp_path / "whole/checkpoint/step-000004/model.safetensors")
        assert all("lora_" in name for name in kept)
        read = load_model(str(tmp_path / "whole"))
    assert not is_quantized(read.model) and not adapters.has_adapter(read.model)


def test_the_base_alone_is_the_teacher_and_the_start(quantised, tmp_path):
    sections = {"teacher": {"model": "self"}, "train": {"steps": 1}}
    with without_their_warnings():
        potstill.train(recipe_of(tmp_path / "run", quantised[1], **sections), quiet=True)
        model = load_model(str(quantised[1]))
    assert rows_of(tmp_path / "run")[0]["reverse_kl"] == pytest.approx(0, abs=1e-6)
    told = potstill.runs.run_folder.read_json(tmp_path / "run/environment.json")["models"]
    assert told["teacher"]["weights"] == fingerprint(model)
    assert told["student"]["weights"] != told["teacher"]["weights"]


def test_merged_is_the_adapter_beside_the_values_of_the_codes(quantised, tmp_path):
    _, folder = quantised
    with without_their_warnings():
        potstill.train(recipe_of(tmp_path / "run", folder), quiet=True)
        main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")])
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        base = load_model(str(folder))
        make_whole(base.model)
    saved = load_file(tmp_path / "run/model/adapter_model.safetensors")
    wanted = dict(base.model.named_parameters())
    for name, weight in merged.named_parameters():
        value = wanted[name]
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") in saved:
            value = value + 32 / 4 * saved[key.format("B")] @ saved[key.format("A")]
        torch.testing.assert_close(weight, value, rtol=1e-5, atol=1e-6)
    assert not is_quantized(merged)


def test_what_is_not_made_of_it_is_refused(quantised, tmp_path):
    from potstill.models.lean.quantized import refuse_to_train

    _, folder = quantised
    with without_their_warnings():
        model = load_model(str(folder)).model
        merged = recipe_of(
            tmp_path / "run", folder, student={"model": str(folder), "lora": {"rank": 4}}
        )
        with pytest.raises(RecipeError, match='save is "merged", which codes cannot hold'):
            potstill.train(merged, quiet=True)
        with pytest.raises(RecipeError, match="there are 2, and the engine"):
            refuse_to_train("it", model, recipe_of(tmp_path / "run", folder), 2)
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_codes_and_adapter(quantised, whole, tmp_path):
    kind, folder = quantised
    of = {
        name: pair_of(recipe_of(tmp_path / "run", path)).student.sizes
        for name, path in (("whole", whole), ("quantised", folder))
    }
    in_layers = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128)
    saved = in_layers * (32 - KINDS[kind][1]) // 8
    assert of["whole"].weight_bytes("float32") - saved == of["quantised"].weight_bytes("float32")
    assert of["quantised"].num_adapter == of["whole"].num_adapter > 0
