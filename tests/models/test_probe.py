"""Abilities that a model must have, and the refusal of one that is not whole or lacks them."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_recipe
from odd_models import edit_config, make_tiny, make_tokenizer, write_folder
from safetensors.torch import load_file, save_file

import potstill
from potstill.config import Evaluation
from potstill.models.language_model import LanguageModel, ModelError
from potstill.models.probe import probe, ready


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer()


@pytest.fixture(scope="module")
def whole(tok, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "whole", tok, make_tiny(tok))


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def rename(weights) -> None:
    for name in list(weights):
        weights[f"module.{name}"] = weights.pop(name)


def half(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pointer(folder: Path, name: str = "model.safetensors") -> None:
    (folder / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 9\n"
    )


QUANTISED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
DAMAGED = {
    "head": (
        lambda f: rewrite(f, lambda w: w.pop("lm_head.weight")),
        r"its files lack 1 weight \(lm_head.weight\); these would",
    ),
    "layer": (
        lambda f: rewrite(f, lambda w: [w.pop(name) for name in list(w) if "layers.1." in name]),
        r"its files lack 9 weights \(model.layers.1.input_layernorm.weight, .*\.\.\.\); these "
        r"would",
    ),
    "prefix": (
        lambda f: rewrite(f, rename),
        r"21 .* and hold 21 weights \(module.lm_head.weight, .*is there a prefix",
    ),
    "more layers": (
        lambda f: edit_config(f, num_hidden_layers=1, layer_types=None),
        r"its files hold 9 weights \(model.layers.1.*has no place",
    ),
    "size": (
        lambda f: edit_config(f, vocab_size=400),
        r"2 weights have another size .*\[314, 32\] there, \[400, 32\]",
    ),
    "nan": (
        lambda f: rewrite(f, lambda w: w["lm_head.weight"][3, 4].fill_(torch.nan)),
        "the weights are not finite: lm_head.weight holds 1 NaN",
    ),
    "infinite": (
        lambda f: rewrite(f, lambda w: w["model.norm.weight"][:2].fill_(torch.inf)),
        "the weights are not finite: model.norm.weight holds 2 infinite",
    ),
    "half": (half, r"model.safetensors' is damaged or cut \(.*get the file again"),
    "pointer": (pointer, r"is a pointer of git-lfs and not the file itself; run `git lfs pull`"),
    "tokenizer pointer": (
        lambda f: pointer(f, "tokenizer.json"),
        r"tokenizer.json' is a pointer of git-lfs",
    ),
    "tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"version": '),
        "cannot be loaded: ",
    ),
    "config": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded: "),
    "no kind": (
        lambda f: edit_config(f, model_type="unheard-of"),
        "cannot be loaded: .*unheard-of",
    ),
    "nonsense": (lambda f: edit_config(f, hidden_size="wide"), "cannot be loaded: "),
    "quantised": (lambda f: edit_config(f, **QUANTISED), "cannot be loaded: .*bitsandbytes"),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "adapter_config.json' names no model that the adapter is of",
    ),
    "end": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [2, 99999]}'),
        "end id 99999 has no row in its head of 314; mend eos_token_id",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(whole, tmp_path, fault):
    damage, message = DAMAGED[fault]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    ready(folder)
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        ready(folder)
    assert "\n" not in str(caught.value)


def test_tied_weights_are_not_missing(tok, tmp_path):
    folder = write_folder(tmp_path / "tied", tok, make_tiny(tok, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = ready(folder)
    assert model.head.weight_VD is model.model.get_input_embeddings().weight


# Architectures with a head, a cache, a router or a backbone of their own kind, and what is not
# their default.
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WORKING = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "qwen3_moe": MOE | {"output_router_logits": True},
    "llama4_text": {"num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 48},
    "gemma2": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0},
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
}


@pytest.mark.parametrize("kind", WORKING)
def test_an_object_of_another_kind_works(tok, kind):
    ready(make_tiny(tok, kind, **WORKING[kind]), tok)


REFUSED = {
    "mamba": ({"state_size": 8}, "keeps no cache of keys and values"),
    "minimax": (
        {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
        "cannot decode a batch of rows of different lengths, some of which end early",
    ),
    "modernbert-decoder": ({}, "its logits differ from hidden states times head"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_object_that_cannot_do_its_part_is_refused_before_anything_is_written(
    tok, tmp_path, kind, role
):
    options, message = REFUSED[kind]
    model = make_tiny(tok, kind, **options)
    objects = {"student": make_tiny(tok, seed=1), "teacher": make_tiny(tok, seed=2)} | {role: model}
    with pytest.raises(ModelError, match=message) as caught:
        potstill.train(
            tiny_recipe(tmp_path / "run"), **objects, tokenizer=tok, prompts=["a"], quiet=True
        )
    assert type(model).__name__ in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_no_usable_object_is_refused_in_one_line(tok, tmp_path):
    recipe, model = tiny_recipe(tmp_path / "run"), make_tiny(tok)
    other = make_tiny(tok, seed=1)
    frozen = make_tiny(tok).requires_grad_(False)
    adapted = make_tiny(tok)
    adapted.peft_config = {"default": None}
    broken = make_tiny(tok)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    for objects, message in (
        (
            {"student": adapted, "teacher": other, "tokenizer": tok},
            "has an adapter of peft already; give what its merge_and_unload",
        ),
        ({"student": 3, "teacher": other, "tokenizer": tok}, "'int' is no model"),
        ({"student": model, "teacher": other}, "without its tokenizer; give tokenizer="),
        (
            {"student": model, "teacher": other, "tokenizer": "gpt2"},
            "tokenizer= is 'gpt2', which is no tokenizer; give what AutoTokenizer",
        ),
        (
            {"student": "potstill:base", "tokenizer": tok},
            "neither student= nor teacher= is an object that needs it.*remove it",
        ),
        (
            {"student": broken, "teacher": other, "tokenizer": tok},
            "not finite: model.layers.1.mlp.up_proj.weight",
        ),
        ({"student": frozen, "teacher": other, "tokenizer": tok}, "has no weight that may change"),
        (
            {"student": "potstill:pupil", "teacher": other, "tokenizer": tok},
            "is not a shipped model",
        ),
    ):
        with pytest.raises(ModelError, match=message):
            potstill.train(recipe, **objects, prompts=["a"], quiet=True)
    assert not recipe.out.exists() and all(p.requires_grad for p in model.parameters())


def test_a_cache_that_forgets_is_caught(tok):
    """The probe can fail: a model that reads its last token alone once it has a cache."""
    wrapped = LanguageModel(make_tiny(tok), tok, "forgetful")
    attention = wrapped.model.model.layers[0].self_attn
    forward = attention.forward

    def forget(hidden_states, past_key_values=None, **options):
        if past_key_values is not None and hidden_states.shape[1] == 1:
            hidden_states = hidden_states * 0
        return forward(hidden_states=hidden_states, past_key_values=past_key_values, **options)

    attention.forward = forget
    with pytest.raises(
        ModelError, match="tokens decoded with its cache have other log-probabilities"
    ):
        probe(wrapped)
    attention.forward = forward
    probe(wrapped)


def test_a_model_is_probed_once(tok, monkeypatch):
    model = ready(make_tiny(tok), tok)
    copy = model.around(make_tiny(tok), "copy")
    monkeypatch.setattr("potstill.models.probe.check_logits", None)
    assert ready(model) is model and ready(copy) is copy
    assert model.model.training is False
    with pytest.raises(TypeError):
        ready(make_tiny(tok), tok)


def test_a_run_folder_is_a_model_wherever_one_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = potstill.train(tiny_recipe("first", train={"steps": 1}), quiet=True)
    recipe = tiny_recipe(
        "second", student={"model": "first"}, teacher={"model": "first"}, train={"steps": 1}
    )
    assert potstill.train(recipe, quiet=True).metrics["reverse_kl"] < 1e-6
    settings = Evaluation(
        source="multiplication", num_problems=2, num_responses=1, temperatures=(0.0,), max_tokens=8
    )
    (row,) = potstill.evaluate("first", settings, quiet=True)
    assert row["model"] == "first"
    (first.folder / "DONE").unlink()
    with pytest.raises(
        ModelError, match="run 'first' is not finished; run `potstill train first/recipe"
    ):
        potstill.train(tiny_recipe("third", student={"model": "first"}), quiet=True)
    assert not Path("third").exists()


def test_operations_leave_out_what_a_configuration_does_not_say(tok, monkeypatch):
    model = ready(make_tiny(tok), tok)
    whole = model.flops
    less = SimpleNamespace(model_type="odd", hidden_size=32, num_hidden_layers=2)
    monkeypatch.setattr(model.model.config, "get_text_config", lambda: less)
    part = model.flops
    assert part.per_pair is None and part.backbone(3) == 3 * whole.per_token < whole.backbone(3)
