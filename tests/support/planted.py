"""Tiny models that write and end like chat models, and those with a fault that nothing refuses."""

import dataclasses
import json
from typing import Any

import torch
from odd_models import make_tiny, write_folder
from odd_tokenizers import family_tokenizer
from torch import nn

from potstill.config import Recipe
from potstill.models.language_model import LanguageModel

QUESTIONS = ("Is the loss one file?", "What holds it?", "All of them?", "Used for what?")
MESSAGES = [[{"role": "user", "content": text}] for text in QUESTIONS]


def chat_tokenizer(**more: Any):
    return family_tokenizer("chatml", **more)


def chat_model(tokenizer, seed: int, ends: str = "<|im_end|>", **more: Any) -> LanguageModel:
    """A model that knows something (its entropy is far from the largest) and ends after a few
    tokens."""
    model = make_tiny(tokenizer, seed=seed, **more)
    with torch.no_grad():
        model.lm_head.weight *= 4
    tilt(model, {tokenizer.convert_tokens_to_ids(ends): 9.0})
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return LanguageModel(model, tokenizer, f"chat-{seed}")


def tilt(model, added: dict[int, float]) -> None:
    """Add to the logits of these ids."""
    bias = torch.zeros(model.lm_head.weight.shape[0])
    for i, value in added.items():
        bias[i] = value
    model.lm_head.bias = nn.Parameter(bias)


class Shifted(LanguageModel):
    """Its hidden states are about the token before."""

    def forward(self, input_ids_BT):
        return super().forward(input_ids_BT).roll(1, dims=1)


class Rescaled(LanguageModel):
    """Its loss is of logits twice as large as those that it writes with."""

    @property
    def head(self):
        return dataclasses.replace(super().head, scale=2.0)


class NotFinite(LanguageModel):
    """Its hidden states are NaN, though its weights are not."""

    def forward(self, input_ids_BT):
        return super().forward(input_ids_BT) * float("nan")


def faulty(kind: type[LanguageModel], model: LanguageModel) -> LanguageModel:
    """The model with a fault that its probe did not see."""
    made = kind(model.model, model.tokenizer, model.name)
    made.is_probed = True
    return made


def chat_recipe(out, **sections: Any) -> Recipe:
    """A recipe for messages and tiny models; sections are merged over the defaults."""
    data: dict[str, Any] = {
        "out": str(out),
        "objective": {"prefix": "student", "kl": "reverse"},
        "window": {"tokens": 32},
        "train": {"steps": 4, "prompts_per_step": 8, "tokens_per_batch": 256, "lr": 1e-3},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return Recipe.model_validate(data)


def write_pair(folder, rows=MESSAGES):
    """Both models as folders and the prompts as a file."""
    tokenizer = chat_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        made = chat_model(tokenizer, seed)
        made.model.lm_head.bias = None
        write_folder(folder / name, tokenizer, made.model, ends=made.end_ids[-1])
    lines = [json.dumps({"prompt": messages}) for messages in rows]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder
