"""Small tokenizers with the special tokens and chat templates of model families; templates are
those that trl ships."""

import importlib.resources
from typing import Any

from odd_models import TEXT, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LLAMA = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
GPT_OSS = (
    "<|endoftext|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
)
R1 = (
    "<s>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chatml": {
        "specials": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        **{"eos": "<|endoftext|>", "bos": None, "pad": "<|endoftext|>", "chat": "qwen3"},
    },
    "gemma": {
        "specials": ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        **{"eos": "<eos>", "bos": "<bos>", "adds_bos": True, "chat": "gemma3"},
    },
    "llama": {
        "specials": LLAMA,
        **{
            "eos": "<|eot_id|>",
            "bos": "<|begin_of_text|>",
            "pad": "<|end_of_text|>",
            "chat": "llama3_2",
        },
    },
    "smolvlm": {
        "specials": ("<|im_start|>", "<|im_end|>", "<end_of_utterance>"),
        **{"eos": "<|im_end|>", "bos": "<|im_start|>", "pad": None, "chat": "smolvlm"},
    },
    "llava": {
        "specials": ("<|im_start|>", "<|im_end|>"),
        **{"eos": "<|im_end|>", "bos": None, "pad": None, "chat": "llava_next"},
    },
    "gpt-oss": {
        "specials": GPT_OSS,
        "eos": "<|return|>",
        "bos": None,
        "pad": "<|endoftext|>",
        "chat": "gptoss",
    },
    "r1": {"specials": R1, "eos": R1[-1], "bos": "<s>", "pad": None, "chat": "deepseek_r1_distill"},
}


def chat_template(name: str) -> str:
    return (importlib.resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def family_tokenizer(family: str, **more: Any) -> PreTrainedTokenizerFast:
    options = FAMILIES[family] | more
    if "chat" in options:
        options["chat"] = chat_template(options["chat"])
    return make_tokenizer(**options)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts a space before every text, as those of SentencePiece do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "0123456789*=\n?:"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
