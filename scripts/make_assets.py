"""Make the shipped models from nothing: `make assets`, or `scripts/make_assets.py NAME...` for some of them.

Writes an untrained model folder for each (configuration and tokenizer), trains their recipes side by side, and puts the
results into the package.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import Qwen3Config

from potstill.tasks.multiplication import build_tokenizer

BUILD = Path("build/assets")
ASSETS = Path("src/potstill/assets")
# Hidden size, layers, feed-forward size, query heads, key-value heads.
SHAPES = {
    "teacher": (96, 3, 256, 4, 2),
    "base": (64, 2, 128, 4, 2),
    "columns-teacher": (96, 3, 256, 4, 2),
    "columns-tiny": (24, 2, 48, 2, 1),
}


def write_blueprint(name: str) -> None:
    """An untrained Qwen3 of the given shape, with the task's tokenizer."""
    tokenizer = build_tokenizer()
    hidden_size, num_layers, feed_forward, num_heads, num_key_value_heads = SHAPES[name]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        intermediate_size=feed_forward,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(BUILD / f"{name}-blueprint")
    tokenizer.save_pretrained(BUILD / f"{name}-blueprint")


def main(names: list[str]) -> None:
    for name in names:
        shutil.rmtree(BUILD / name, ignore_errors=True)
        write_blueprint(name)
    # One thread each: the models are too small for two threads to help one of them.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}

    def train(name: str) -> int:
        return subprocess.call([sys.executable, "-m", "potstill", "train", f"assets-{name}"], env=one_thread)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        exit_codes = list(pool.map(train, names))
    if any(exit_codes):
        sys.exit("making the assets failed; the shipped ones are untouched")
    for name in names:
        shutil.rmtree(ASSETS / name, ignore_errors=True)
        shutil.copytree(BUILD / name / "model", ASSETS / name)
        for row in map(json.loads, (BUILD / name / "evals.jsonl").read_text().splitlines()):
            value, low, high = row["avg"]
            print(f"{name} at T={row['temperature']:g}: Avg@{row['num_responses']} {value:.1%} [{low:.1%}, {high:.1%}]")


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHAPES))
