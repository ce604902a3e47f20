"""Reinforcement learning beside that of TRL's GRPOTrainer: what the student can do afterwards, and
the processor's time.

Both learn from the shipped base by the shipped recipe `rl`: 40 steps of 12 prompts with 8 responses
each. The prompts, their order, the sampling of the responses and the scores are potstill's in both,
so that only the advantages, the loss and the update differ. TRL's loss is its "dapo", which has our
normalisation by tokens. Both take turns in one process, and which goes first changes from seed to
seed. `steps` is the process CPU time from the end of the first step to the end of the last, `all`
that of the whole call, with its start and its checks.
"""

import copy
import datetime
import logging
import math
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

import potstill
from potstill.config import Evaluation, Recipe, make_recipe
from potstill.evaluation.scores import evaluate
from potstill.models import distributed
from potstill.models.language_model import LanguageModel, without_progress_bars
from potstill.models.sampling import sample
from potstill.prompts.mixture import step_places
from potstill.training.setup import Setup, prepare

EVALUATION = Evaluation(
    source="multiplication", num_problems=60, num_responses=16, temperatures=(1.0,)
)
# Responses of one pass of TRL's student.
ROWS = 32
METHODS = ("potstill", "TRL")


class Measured(NamedTuple):
    """Avg@16 at temperature 1, and CPU seconds of all steps but the first, and of all."""

    avg: float
    steps: float
    whole: float


def of_potstill(recipe: Recipe) -> tuple[LanguageModel, list[float]]:
    """The student of a run, and the CPU time at the end of each step."""
    ends: list[float] = []
    run = potstill.train(recipe, quiet=True, on_step=lambda row: ends.append(time.process_time()))
    return run.student, ends


class Steps(TrainerCallback):
    """Functions that TRL calls in each step."""

    def __init__(self, recipe: Recipe, setup: Setup):
        self.recipe, self.setup = recipe, setup
        self.step = 0
        self.texts: list[str] = []
        self.places: list[int] = []
        self.ends: list[float] = []

    def write(self, places: list[str], trainer) -> dict[str, Any]:
        """Respond to the prompts at these places, each group in a row, as potstill does."""
        setup, student = self.setup, self.setup.student
        student.eval()
        self.places = [int(place) for place in places]
        prompts = [setup.prompts[place].token_ids for place in self.places]
        completions = sample(
            student.model,
            prompts,
            [(self.recipe.train.seed, self.step, number) for number in range(len(prompts))],
            max_tokens=self.recipe.window.tokens,
            end_ids=setup.ends.stop_ids,
            sampling=self.recipe.sampling,
        )
        student.train()
        ids = [list(completion.token_ids) for completion in completions]
        self.texts = student.tokenizer.batch_decode(ids, skip_special_tokens=True)
        log_probs = [list(completion.log_probs) for completion in completions]
        asked = [list(prompt) for prompt in prompts]
        return {"prompt_ids": asked, "completion_ids": ids, "logprobs": log_probs}

    def score(self, **columns: Any) -> list[float | None]:
        """The task's scores of what was written last."""
        assert self.setup.grader is not None
        examples = [self.setup.prompts[place].example for place in self.places]
        return [grade.score for grade in self.setup.grader.grade(examples, self.texts)]

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note when the step has ended."""
        self.step += 1
        self.ends.append(time.process_time())


def of_trl(recipe: Recipe) -> tuple[LanguageModel, list[float]]:
    """The same of TRL's trainer."""
    setup, settings = prepare(recipe, distributed.start()), recipe.train
    student, steps = setup.student, Steps(recipe, setup)
    num = settings.prompts_per_step * recipe.reward.group_size
    places = []
    for step in range(settings.steps):
        places += step_places(
            len(setup.prompts), setup.mixture, settings.prompts_per_step, step, settings.seed
        )
    optimizer = torch.optim.AdamW(
        student.parameters(), settings.lr or 0.0, settings.betas, weight_decay=0.0
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = GRPOConfig(
            output_dir=scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=num // ROWS,
            num_generations=recipe.reward.group_size,
            loss_type="dapo",
            beta=0.0,
            max_grad_norm=settings.max_grad_norm,
            shuffle_dataset=False,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=settings.seed,
        )
        trainer = GRPOTrainer(
            model=student.model,
            reward_funcs=steps.score,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [str(place) for place in places]}),
            processing_class=copy.deepcopy(student.tokenizer),
            callbacks=[steps],
            optimizers=(optimizer, scheduler),
            rollout_func=steps.write,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return student, steps.ends


def measure(method: str, seed: int, folder: Path, num_steps: int) -> Measured:
    """One run of one method, evaluated."""
    fields = {"out": str(folder / f"{method}-{seed}"), "train.seed": seed, "train.steps": num_steps}
    resolved = potstill.load_recipe("rl", fields).resolved()
    recipe = make_recipe({name: value for name, value in resolved.items() if name != "evaluation"})
    began = time.process_time()
    student, ends = {"potstill": of_potstill, "TRL": of_trl}[method](recipe)
    whole = time.process_time() - began
    (row,) = evaluate(student, EVALUATION, quiet=True)
    return Measured(row["avg"][0], ends[-1] - ends[0], whole)


def main(seeds: tuple[int, ...] = (0, 1, 2), num_steps: int = 40) -> None:
    """Print what each seed gives, and the means."""
    torch.set_num_threads(1)
    for name in ("trl", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found: dict[str, list[Measured]] = {method: [] for method in METHODS}
    table = Table("seed", *(f"{m} {what}" for m in METHODS for what in ("Avg@16", "steps", "all")))
    with tempfile.TemporaryDirectory() as folder, without_progress_bars():
        for turn, seed in enumerate(seeds):
            for method in METHODS[:: 1 if turn % 2 == 0 else -1]:
                found[method].append(measure(method, seed, Path(folder), num_steps))
            last = [found[method][-1] for method in METHODS]
            table.add_row(str(seed), *(_shown(each) for one in last for each in one))
    console = Console()
    console.print(table)
    for method, runs in found.items():
        values = [run.avg for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        console.print(f"{method}: Avg@16 {statistics.fmean(values):.3f}, spread {spread:.3f}")
    for part in ("steps", "whole"):
        ours, theirs = (sum(getattr(run, part) for run in found[method]) for method in METHODS)
        console.print(f"CPU seconds of potstill over those of TRL, {part}: {ours / theirs:.3f}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    date = datetime.date.today()
    console.print(f"{date}, Python {platform.python_version()}, {versions}, one thread")


def _shown(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


if __name__ == "__main__":
    tyro.cli(main)
