import json
import shutil

import pytest
import torch
from conftest import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from potstill.models.language_model import (
    ASSETS,
    LanguageModel,
    ModelError,
    find_end_ids,
    fingerprint,
    load_model,
    save_model,
)
from potstill.models.probe import check_logits


@pytest.fixture
def folder(tmp_path):
    model = make_model()
    save_model(model, dict(model.model.named_parameters()), model.end_ids, tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_loads_as_itself(folder):
    loaded = load_model(str(folder))
    assert fingerprint(loaded) == fingerprint(make_model()) != fingerprint(make_model(seed=5))
    assert loaded.end_ids == (2,)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_bad_folders_are_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="'/no/where' does not exist"):
        load_model("/no/where")
    with pytest.raises(ModelError, match="'nobody/nothing' is not here nor in the hub's cache"):
        load_model("nobody/nothing")
    with pytest.raises(
        ModelError, match="'potstill:pupil' is not a shipped model; choose one of potstill:base"
    ):
        load_model("potstill:pupil")
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"only as pickle \(pytorch_model.bin\).*convert it to safetensors"
    ):
        load_model(str(pickled))
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(pickled))


def test_random_weights_need_a_configuration_only_and_follow_the_seed(folder):
    (folder / "model.safetensors").unlink()
    first, same, other = (load_model(str(folder), init="random", seed=seed) for seed in (1, 1, 2))
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)


def test_end_ids_come_from_tokenizer_settings_and_template():
    model = make_model()
    tokenizer = model.tokenizer
    assert find_end_ids(model.model, tokenizer) == (2,)
    model.model.generation_config.eos_token_id = [22, 2]
    assert find_end_ids(model.model, tokenizer) == (2, 22)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    assert find_end_ids(model.model, tokenizer) == (
        2,
        22,
        tokenizer.convert_tokens_to_ids("<turn>"),
    )


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma2", "cohere", "granite", "gpt2", "mistral"]
)
def test_scaling_and_soft_capping_of_other_architectures(architecture):
    """check_logits compares with the model's own logits, so passing it is the test."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    sizes |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    special = {
        "gemma2": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 4.0},
        "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_inner": 32},
    }.get(architecture, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **sizes, **special)
    ).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    wrapped = LanguageModel(model, make_model().tokenizer, architecture)
    check_logits(wrapped)
    # The check can fail: an unknown scaling is an error, not a silent difference.
    forward = model.forward
    model.forward = lambda **inputs: type(out := forward(**inputs))(logits=out.logits * 1.01 + 0.01)
    with pytest.raises(ModelError, match="changes its logits in a way that potstill does not know"):
        check_logits(wrapped)


def test_shipped_folders_are_small_safetensors():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    later = [path for path in files if path.parent.name not in ("teacher", "base")]
    assert sum(path.stat().st_size for path in later) < 3_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for name in ("teacher", "base"):
        assert (
            json.loads((ASSETS / name / "generation_config.json").read_text())["eos_token_id"] == 2
        )


def test_the_shipped_models_of_the_stop_study_end_differently():
    """One vocabulary, two ends; at the end of an answer each is as good as sure of its own, one
    teacher repeats it."""
    eos, im_end, after = 2, 23, {}
    for name, end_id in (("student", eos), ("teacher", im_end), ("teacher-loop", im_end)):
        model = load_model(f"potstill:stops-{name}")
        assert model.end_ids == (end_id,) and len(model.tokenizer) == model.vocab_size == 24
        ids = model.tokenizer.encode("__84*2=4*2+0=08|8*2+0=16|#168.<im_end>")
        probs_TV = model.model(input_ids=torch.tensor([ids])).logits[0, -2:].softmax(-1)
        assert probs_TV[0, end_id] > 0.8
        after[name] = probs_TV[1, im_end].item()
    assert after["teacher-loop"] > 0.9 > 0.1 > after["teacher"]
