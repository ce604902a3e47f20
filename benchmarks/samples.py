"""The cost of logging two rollouts in a step that logs them: over its loss and gradients, and over
the whole step.

Random two-layer models of one width with a vocabulary of real size, on rollouts that the student
writes up to the window. The parts are those of the run's own log: time on the clock of one process,
one after the other.
"""

import tempfile
from pathlib import Path

import torch
import tyro
from transformers import Qwen3Config, Qwen3ForCausalLM

from potstill.config import Recipe
from potstill.models.character_tokenizer import build_tokenizer
from potstill.models.language_model import LanguageModel
from potstill.runs.run_folder import read_rows
from potstill.training.loop import train


def random_model(dim: int, vocab_size: int, seed: int) -> LanguageModel:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=dim // 64,
        num_key_value_heads=max(dim // 128, 1),
        head_dim=64,
        intermediate_size=3 * dim,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return LanguageModel(Qwen3ForCausalLM(config).eval(), build_tokenizer(), f"random-{dim}-{seed}")


def main(
    dims: tuple[int, ...] = (256, 1024),
    vocab_size: int = 151_936,
    num_rollouts: int = 8,
    window: int = 384,
    steps: int = 2,
    threads: int = 1,
) -> None:
    """Measure and print one line a width; of several steps the last, for the first one
    allocates."""
    torch.set_num_threads(threads)
    for dim in dims:
        with tempfile.TemporaryDirectory(prefix="potstill-samples-") as folder:
            data = {
                "out": str(Path(folder) / "run"),
                "data": {"source": "multiplication", "num_prompts": 64},
                "window": {"tokens": window},
                "objective": {"prefix": "student", "kl": "reverse"},
                "train": {
                    "steps": steps,
                    "prompts_per_step": num_rollouts,
                    "warmup_steps": 0,
                    "lr": 1e-6,
                },
            }
            data["train"]["checkpoint_every"] = 1
            student, teacher = (random_model(dim, vocab_size, seed) for seed in (0, 1))
            train(Recipe.model_validate(data), student=student, teacher=teacher, quiet=True)
            row = read_rows(Path(folder) / "run/metrics.jsonl")[-1]
        loss = row["teacher_seconds"] + row["student_seconds"]
        samples = row["samples_seconds"]
        print(
            f"d={dim} {num_rollouts} rollouts of {row['length']:.0f}: samples {samples:.2f} s, "
            f"loss and update {loss:.2f} s, whole step {row['seconds']:.2f} s: "
            f"{samples / loss:.3f} and {samples / row['seconds']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    tyro.cli(main)
