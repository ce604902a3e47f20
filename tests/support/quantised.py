"""Quantised checkpoints of a small model, as transformers writes them."""

import importlib.util
import warnings
from contextlib import contextmanager

import pytest
import torch
import transformers

from potstill.models.language_model import load_tokenizer

KINDS = {"int8": ("torchao", 8), "nf4": ("bitsandbytes", 4), "llm-int8": ("bitsandbytes", 8)}


@contextmanager
def without_their_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def settings_of(kind):
    """The settings of transformers by which a model is quantised."""
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def write_whole(folder):
    """A small model whose widths are what every kind asks for, with the shipped vocabulary."""
    torch.manual_seed(3)
    tokenizer = load_tokenizer("potstill:stops-teacher")
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_quantised(whole, kind):
    """The folder of a checkpoint of this kind, beside the whole model. Skips where the kind's
    library is not installed."""
    if importlib.util.find_spec(KINDS[kind][0]) is None:
        pytest.skip(f"{KINDS[kind][0]} is not installed")
    folder = whole.with_name(kind)
    with without_their_warnings():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            whole, dtype=torch.float32, quantization_config=settings_of(kind)
        )
        model.save_pretrained(folder)
    load_tokenizer(str(whole)).save_pretrained(folder)
    assert not [*folder.glob("*.bin")]
    return folder
