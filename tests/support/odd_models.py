"""Tiny random models of any architecture, with tokenizers of their own, as objects and as
folders."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "The loss is one file. A folder holds it; it is printed, stored, used for every one and all "
    "of them. " * 3
)
SPECIALS = ("<pad>", "<s>", "</s>")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    # Large, so that two random models differ by more than rounding.
    "initializer_range": 0.2,
}


def make_tokenizer(
    specials=SPECIALS,
    eos: str = "</s>",
    bos: str | None = "<s>",
    pad: str | None = "<pad>",
    **options,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of some 300 ids. Options: `adds_bos`, `adds_eos`, `chat` (a
    template)."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=alphabet,
        special_tokens=list(specials),
        show_progress=False,
    )
    tok.train_from_iterator([TEXT], trainer)
    if options.get("adds_bos") or options.get("adds_eos"):
        single = " ".join(
            [str(bos)] * bool(options.get("adds_bos"))
            + ["$A"]
            + [eos] * bool(options.get("adds_eos"))
        )
        ids = [(token, tok.token_to_id(token)) for token in (bos, eos) if token]
        tok.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, **{name: token for name, token in names.items() if token}
    )
    fast.add_special_tokens({"additional_special_tokens": list(specials)})
    fast.chat_template = options.get("chat")
    return fast


def make_tiny(
    tok: PreTrainedTokenizerFast, kind: str = "llama", seed: int = 0, rows: int = 0, **more: Any
):
    """A model of an architecture by its `model_type`, with so many rows in its head beyond the
    tokenizer's ids."""
    ids = {name: getattr(tok, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(kind, **(SIZES | {"vocab_size": len(tok) + rows} | ids | more))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def write_folder(folder: Path, tok: PreTrainedTokenizerFast, model, ends: Any = None) -> Path:
    """A plain Hugging Face folder; `ends` are the end ids of its generation settings."""
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def edit_config(folder: Path, **fields: Any) -> Path:
    """Change a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder
