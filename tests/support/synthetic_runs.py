"""Finished run folders without a training: what the report reads, from numbers that are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from potstill.config import Recipe, to_toml
from potstill.evaluation.scores import per_problem, summarize_responses


def evaluation_rows(
    rng, accuracy: float, num_problems: int, num_responses: int
) -> list[dict[str, Any]]:
    """Responses whose chance to be right is `accuracy`, as the evaluation grades them."""
    rows = []
    for problem in range(num_problems):
        for response in range(num_responses):
            length = int(rng.integers(20, 60))
            right = bool(rng.random() < accuracy)
            rows.append(
                {
                    "problem": f"p{problem}",
                    "response": response,
                    "text": "",
                    "stop": "length" if rng.random() < 0.1 else "end",
                    "score": float(right),
                    "answer": "1" if right else "0",
                    "length": length,
                    "length_to_answer": length - 5,
                    "entropy": float(length * rng.uniform(0.1, 0.3)),
                    "entropy_before_answer": float((length - 5) * rng.uniform(0.1, 0.3)),
                    "zlib_ratio": 1.0,
                    "is_loop": False,
                }
            )
    return rows


def evaluate(
    seed: int, accuracy: float, num_problems: int = 12, num_responses: int = 4
) -> list[dict[str, Any]]:
    """Two temperatures of an evaluation."""
    found = []
    for i, temperature in enumerate((1.0, 0.6)):
        rows = evaluation_rows(
            np.random.default_rng((seed, i)), accuracy, num_problems, num_responses
        )
        problems = [rows[p * num_responses : (p + 1) * num_responses] for p in range(num_problems)]
        settings = {
            "source": "multiplication",
            "split": "test",
            "template": None,
            "num_problems": num_problems,
        }
        settings |= {"num_responses": num_responses, "max_tokens": 60, "seed": 0}
        found.append(
            {
                "model": "m",
                "temperature": temperature,
                **summarize_responses(rows, num_responses),
                "levels": {},
                "problems": per_problem(problems),
                "notes": {},
                "settings": settings,
            }
        )
    return found


def rewarded(start: Path | str, **train: Any) -> dict[str, Any]:
    """The sections of a recipe of reinforcement learning from a run or model."""
    return {
        "student": {"model": str(start)},
        "objective": {"prefix": "student", "kl": "none"},
        "reward": {"weight": 1.0},
        "train": train,
    }


def write_run(
    folder: Path,
    evals: list[dict[str, Any]],
    num_steps: int = 40,
    decisions: list[dict[str, Any]] | None = None,
    **sections: Any,
) -> Path:
    """A finished run with this evaluation; `sections` are those of its recipe."""
    recipe = Recipe.model_validate({"out": str(folder), **sections})
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(to_toml(recipe.resolved()))
    metrics = [
        {
            "step": step,
            "forward_kl": 1 / step,
            "reverse_kl": 2 / step,
            "student_entropy_before_answer": 0.3,
            "length": 40.0,
            "truncation": 0.1,
            "num_loss_tokens": 1000,
            "grad_norm": 1.0,
            "window": 16 if decisions and step < num_steps / 2 else 32,
            "total_flops": 1e9 * step,
            "seconds": 0.5,
        }
        for step in range(1, num_steps + 1)
    ]
    for name, rows in (
        ("metrics", metrics),
        ("evals", [{"step": num_steps, **row} for row in evals]),
        ("window", decisions or []),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "DONE").write_text(recipe.identity() + "\n")
    return folder
