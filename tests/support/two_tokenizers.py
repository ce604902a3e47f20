"""Tokenizers of one text that cut it in different places, and models over them."""

import json

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from potstill.models.character_tokenizer import CHARACTERS
from potstill.models.language_model import LanguageModel
from potstill.rollouts.spans import Spelling

SPECIAL = ("<s>", "</s>")
DIGITS = "0123456789"


def _named(tokenizer):
    """With `<s>` before a text, and `</s>` as the end."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def merging_tokenizer(characters=CHARACTERS, merged=DIGITS):
    """One token a character, and one for each two that are `merged`."""
    pairs = [(a, b) for a in merged for b in merged]
    tokens = (*characters, *SPECIAL, *(a + b for a, b in pairs))
    model = models.BPE({token: i for i, token in enumerate(tokens)}, pairs)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return _named(tokenizer)


def character_tokenizer(characters, specials=SPECIAL):
    """One token a character, in this order."""
    tokens = {token: i for i, token in enumerate((*specials, *characters))}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _named(tokenizer)


def byte_tokenizer(texts, size):
    """A byte-level BPE that was trained on these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _named(tokenizer)


def space_tokenizer(texts, size):
    """One that marks spaces, puts one before a text, and falls back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Bytes are text, and no special tokens.
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] in SPECIAL]
    return _named(Tokenizer.from_str(json.dumps(described)))


def reader(tokenizer, end_ids=None, context_length=None):
    """A reader whose end is that of the tokenizer."""
    return Spelling(
        tokenizer=tokenizer,
        end_ids=(tokenizer.eos_token_id,) if end_ids is None else end_ids,
        vocab_size=len(tokenizer),
        context_length=context_length,
    )


def random_model(tokenizer, seed=0, name="teacher", dtype=torch.float32, spread=1.0):
    """A small model over a tokenizer, whose logits are `spread` times those of fresh weights."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=256,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=False,
    )
    # Its norms compute in the type of the weights.
    model = GPT2LMHeadModel(config).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(spread)
    return LanguageModel(model.eval(), tokenizer, name)
