"""Make the shipped teacher and base student from nothing: `make assets`.

Writes an untrained model folder for each (configuration and tokenizer), trains both recipes side by side, and puts the
results into the package.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import Qwen3Config

from potstill.tasks.multiplication import build_tokenizer

BUILD = Path("build/assets")
ASSETS = Path("src/potstill/assets")
SHAPES = {
    "teacher": {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 256},
    "base": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128},
}


def write_blueprint(name: str) -> None:
    """An untrained Qwen3 of the given shape, with the task's tokenizer."""
    tokenizer = build_tokenizer()
    shape = SHAPES[name]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape["hidden_size"] // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        architectures=["Qwen3ForCausalLM"],
        **shape,  # pyright: ignore[reportArgumentType]
    )
    config.save_pretrained(BUILD / f"{name}-blueprint")
    tokenizer.save_pretrained(BUILD / f"{name}-blueprint")


def main() -> None:
    shutil.rmtree(BUILD, ignore_errors=True)
    for name in SHAPES:
        write_blueprint(name)
    # One thread each: the models are too small for two threads to help one of them.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-m", "potstill", "train", f"assets-{name}"] for name in SHAPES]
    jobs = [subprocess.Popen(command, env=one_thread) for command in commands]
    exit_codes = [job.wait() for job in jobs]
    if any(exit_codes):
        sys.exit("making the assets failed; the shipped ones are untouched")
    for name in SHAPES:
        shutil.rmtree(ASSETS / name, ignore_errors=True)
        shutil.copytree(BUILD / name / "model", ASSETS / name)
        for row in map(json.loads, (BUILD / name / "evals.jsonl").read_text().splitlines()):
            value, low, high = row["avg"]
            print(f"{name} at T={row['temperature']:g}: Avg@{row['num_responses']} {value:.1%} [{low:.1%}, {high:.1%}]")


if __name__ == "__main__":
    main()
