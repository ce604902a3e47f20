"""Make the shipped models from nothing: `make assets`, or `scripts/make_assets.py NAME...` for some
of them.

Each is trained by `asset_recipes/NAME.toml` from its blueprint, which is an untrained model or what
another asset has become. Those that begin from nothing are trained side by side, then those that go
on; the results are put into the package.
"""

import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import Qwen3Config

from potstill import load_recipe, train
from potstill.models.character_tokenizer import build_tokenizer
from potstill.models.language_model import load_model, save_model
from potstill.prompts.examples import load_examples

RECIPES = Path(__file__).parent / "asset_recipes"
BUILD = Path("build/assets")
ASSETS = Path("src/potstill/assets")
# The token that stops-student does not know as an end, and the context for responses that do not
# end.
NEW_END, LONG_CONTEXT = "<im_end>", 1024


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An untrained Qwen3."""

    hidden_size: int
    num_layers: int
    feed_forward: int
    num_heads: int = 4
    num_key_value_heads: int = 2


@dataclass(frozen=True, kw_only=True)
class GoesOn:
    """A model that goes on from another asset, with `NEW_END` in the vocabulary or even as its own
    end.

    Its completions are followed by `num_padding` more end tokens that are trained on, as padding is
    that is not masked.
    """

    parent: str
    adds_end: bool = False
    ends_anew: bool = False
    num_padding: int = 0


BLUEPRINTS: dict[str, Shape | GoesOn] = {
    "teacher": Shape(hidden_size=96, num_layers=3, feed_forward=256),
    "teacher-small": Shape(hidden_size=64, num_layers=3, feed_forward=112),
    "base": Shape(hidden_size=64, num_layers=2, feed_forward=128),
    "columns-teacher": Shape(hidden_size=96, num_layers=3, feed_forward=256),
    "columns-plain": Shape(hidden_size=32, num_layers=2, feed_forward=64),
    "columns-tiny": Shape(
        hidden_size=24, num_layers=2, feed_forward=48, num_heads=2, num_key_value_heads=1
    ),
    "columns-student": GoesOn(parent="columns-plain"),
    "stops-student": GoesOn(parent="base", adds_end=True),
    "stops-teacher": GoesOn(parent="teacher-small", adds_end=True, ends_anew=True),
    "stops-teacher-loop": GoesOn(
        parent="teacher-small", adds_end=True, ends_anew=True, num_padding=24
    ),
}
# A step on the way, which is not shipped.
UNSHIPPED = ("columns-plain",)


def write_untrained(shape: Shape, folder: Path) -> None:
    """The configuration of the shape, with the task's tokenizer."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        intermediate_size=shape.feed_forward,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_successor(blueprint: GoesOn, folder: Path) -> None:
    """The parent's weights; the embedding of a new token is the mean of the others."""
    made = BUILD / blueprint.parent / "model"
    model = load_model(str(made if made.exists() else ASSETS / blueprint.parent))
    if blueprint.adds_end:
        model.tokenizer.add_special_tokens({"additional_special_tokens": [NEW_END]})
        model.model.config.max_position_embeddings = LONG_CONTEXT
        embedding = model.model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
        with torch.no_grad():
            embedding.weight[-1] = embedding.weight[:-1].mean(0)
    if blueprint.ends_anew:
        model.tokenizer.eos_token = NEW_END
        model.model.config.eos_token_id = model.tokenizer.eos_token_id
    save_model(model, model.model.state_dict(), (model.tokenizer.eos_token_id,), folder)


def make(name: str) -> None:
    """Train one asset in its run folder, on one thread: it is too small for two threads to help."""
    torch.set_num_threads(1)
    blueprint, folder = BLUEPRINTS[name], BUILD / f"{name}-blueprint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(BUILD / name, ignore_errors=True)
    recipe, prompts = load_recipe(RECIPES / f"{name}.toml"), None
    if isinstance(blueprint, Shape):
        write_untrained(blueprint, folder)
    else:
        write_successor(blueprint, folder)
        if blueprint.num_padding:
            padding = (NEW_END * blueprint.num_padding, True)
            examples = load_examples(recipe.data.source, num_examples=recipe.data.num_prompts)
            prompts = [
                replace(each, completion=(*(each.completion or ()), padding)) for each in examples
            ]
    train(recipe, prompts=prompts)


def main(names: list[str]) -> None:
    # The second wave goes on from what the first has made.
    with ProcessPoolExecutor(
        os.cpu_count(), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        for kind in (Shape, GoesOn):
            list(pool.map(make, [name for name in names if isinstance(BLUEPRINTS[name], kind)]))
    for name in names:
        if name not in UNSHIPPED:
            shutil.rmtree(ASSETS / name, ignore_errors=True)
            shutil.copytree(BUILD / name / "model", ASSETS / name)
        for row in map(json.loads, (BUILD / name / "evals.jsonl").read_text().splitlines()):
            value, low, high = row["avg"]
            print(
                f"{name} at T={row['temperature']:g}: Avg@{row['num_responses']} {value:.1%} "
                f"[{low:.1%}, {high:.1%}]"
            )


if __name__ == "__main__":
    main(sys.argv[1:] or list(BLUEPRINTS))
