"""Layers that run again in the backward pass: the same bits, less that is kept, and a clear
refusal."""

import pytest
import torch
from conftest import tiny_recipe
from odd_models import make_tiny, make_tokenizer

import potstill
from potstill.models.language_model import LanguageModel, ModelError
from potstill.models.lean.activations import layers_run_again
from potstill.runs import run_folder

ARCHITECTURES = {
    "qwen3": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "attn_pdrop": 0.3, "resid_pdrop": 0.3},
}


def run(folder, tok, architecture: str, again: bool):
    recipe = tiny_recipe(
        folder,
        objective={"prefix": "student", "kl": "reverse"},
        student={"dropout": architecture == "gpt2"},
        teacher={"model": "self"},
        window={"tokens": 8},
        train={"steps": 3, "prompts_per_step": 4, "lr": 1e-3, "activation_checkpointing": again},
    )
    student = make_tiny(tok, architecture, **ARCHITECTURES[architecture])
    prompts = ["The", "loss", "is", "one"]
    result = potstill.train(recipe, student=student, tokenizer=tok, prompts=prompts, quiet=True)
    rows = run_folder.read_rows(folder / "metrics.jsonl")
    numbers = [(row["loss"], row["grad_norm"], row["reverse_kl"]) for row in rows]
    return numbers, result.student.model.state_dict()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_is_the_same_to_the_bit(tmp_path, architecture):
    tok = make_tokenizer()
    numbers, weights = run(tmp_path / "plain", tok, architecture, False)
    again, its_weights = run(tmp_path / "again", tok, architecture, True)
    assert again == numbers
    assert all(torch.equal(its_weights[name], weight) for name, weight in weights.items())


def kept_bytes(model, ids) -> int:
    """The bytes that a forward pass keeps for its backward pass, weights left out."""
    weights = {weight.data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    hidden.sum().backward()
    return sum(kept.values())


def test_layers_keep_their_inputs_alone():
    tok = make_tokenizer()
    model = make_tiny(tok, "qwen3", num_hidden_layers=8)
    ids = torch.randint(3, 20, (4, 64), generator=torch.Generator().manual_seed(0))
    plain = kept_bytes(model.model, ids)
    expected = [weight.grad.clone() for weight in model.model.parameters()]
    model.zero_grad()
    with layers_run_again(model):
        again = kept_bytes(model.model, ids)
    assert again < plain / 4
    found = [weight.grad for weight in model.model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_names_no_layers_is_refused(tmp_path, monkeypatch):
    tok = make_tokenizer()
    student = make_tiny(tok, "qwen3")
    monkeypatch.setattr(type(student), "_no_split_modules", None)
    student._no_split_modules = None
    recipe = tiny_recipe(tmp_path / "run", train={"activation_checkpointing": True})
    with pytest.raises(ModelError, match=r"does not name its layers.*tokens_per_batch"):
        potstill.train(recipe, student=LanguageModel(student, tok, "odd"), quiet=True)
    assert not (tmp_path / "run").exists()
