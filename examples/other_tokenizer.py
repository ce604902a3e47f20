"""Make a teacher with another tokenizer, whose tokens may be two digits, from the shipped one.

    python examples/other_tokenizer.py
    potstill train examples/other_tokenizer.toml

Its new tokens begin as the mean of their digits, and it learns to use them from the task's own
solutions, in some minutes on a CPU.
"""

import argparse
import itertools

import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

import potstill
from potstill.models.language_model import load_model

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--out", default="runs/digit-pairs")
options = parser.parse_args()

shipped = load_model("potstill:teacher")
characters = [token for token in shipped.tokenizer.get_vocab() if len(token) == 1]
pairs = list(itertools.product("0123456789", repeat=2))
tokens = [*sorted(characters), *map("".join, pairs), "<start>", "<end>"]
ids = {token: i for i, token in enumerate(tokens)}
bpe = Tokenizer(models.BPE(ids, pairs))
bpe.decoder = decoders.Fuse()
start = [("<start>", ids["<start>"])]
bpe.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=start)
names = {"bos_token": "<start>", "eos_token": "<end>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=512, **names)

old_names = {"<start>": ["<bos>"], "<end>": ["<eos>"]}
parts = [shipped.tokenizer.convert_tokens_to_ids(old_names.get(t, list(t))) for t in tokens]
rows = shipped.head.weight_VD.detach().clone()
model = shipped.model
model.resize_token_embeddings(len(tokens))
with torch.no_grad():
    # The head is the embedding.
    for i, old_ids in enumerate(parts):
        model.get_input_embeddings().weight[i] = rows[old_ids].mean(0)
for config in (model.config, model.generation_config):
    config.bos_token_id, config.eos_token_id = ids["<start>"], ids["<end>"]
    config.pad_token_id = None

recipe = potstill.Recipe.model_validate(
    {
        "out": options.out,
        "data": {"source": "multiplication:persona"},
        "objective": {"prefix": "dataset", "signal": "labels"},
        "window": {"tokens": 96},
        "train": {
            "steps": options.steps,
            "prompts_per_step": 64,
            "lr": 2e-3,
            "warmup_steps": 0,
        },
    }
)
potstill.train(recipe, student=model, tokenizer=tokenizer)
