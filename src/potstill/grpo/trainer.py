"""TRL's trainer of GRPO, with our schedule, window, log and checkpoints."""

import contextlib
import copy
import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback

from potstill import files
from potstill.config import Grpo, GrpoRecipe, Train
from potstill.console.boundary import stopped_after
from potstill.console.progress import StepDisplay
from potstill.grpo.responses import (
    GrpoSetup,
    Response,
    State,
    probe_grpo_window,
    response_means,
    score,
    write,
)
from potstill.models.flops import rollout_flops, training_flops
from potstill.models.language_model import without_progress_bars
from potstill.runs.schema import FLOPS_PARTS, GrpoMetrics, GrpoRow, OldRewards, WindowRow
from potstill.seeds import step_indices, step_seed
from potstill.training import checkpoint
from potstill.training.controllers import decide, is_probe_due, scheduled_window
from potstill.training.metrics import Stopwatch, describe, timing
from potstill.training.rates import learning_rate
from potstill.types import NonFiniteError


def make_grpo_trainer(
    recipe: GrpoRecipe,
    setup: GrpoSetup,
    optimizer: torch.optim.Optimizer,
    steps: "Steps",
    scratch: str,
):
    """TRL's trainer of the steps that are left. Its data set is the places of the prompts, step
    after step."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    config = recipe.grpo
    num_responses = config.prompts_per_step * config.group_size
    rows = max(
        n for n in range(1, min(config.rows_per_batch, num_responses) + 1) if num_responses % n == 0
    )
    places = [
        str(place)
        for step in range(steps.step, config.steps)
        for place in step_indices(len(setup.prompts), config.prompts_per_step, step, config.seed)
    ]
    settings = GRPOConfig(
        output_dir=scratch,
        max_steps=config.steps - steps.step,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=num_responses // rows,
        num_generations=config.group_size,
        temperature=recipe.sampling.temperature,
        beta=config.kl_weight,
        max_grad_norm=config.max_grad_norm,
        shuffle_dataset=False,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=setup.world.device.type == "cpu",
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        disable_dropout=True,
        seed=config.seed,
    )
    # A copy, which TRL gives a padding token where it has none: the first end token. Masks come
    # from lengths.
    tokenizer = copy.deepcopy(setup.model.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(setup.end_ids[0])
    trainer = GRPOTrainer(
        model=setup.model.model,
        reward_funcs=steps.score,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": places}),
        processing_class=tokenizer,
        callbacks=[steps],
        optimizers=(optimizer, _make_scheduler(config, optimizer, steps.step)),
        rollout_func=steps.write,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _make_scheduler(config: Grpo, optimizer: torch.optim.Optimizer, start: int):
    """The rates of a distillation (`training.learning_rate`), from step `start` on."""
    rates = Train(
        steps=config.steps, lr=config.lr, schedule=config.schedule, warmup_steps=config.warmup_steps
    )
    return LambdaLR(
        optimizer, lambda step: learning_rate(rates, step) / config.lr, last_epoch=start - 1
    )


class Steps(TrainerCallback):
    """Functions that TRL calls in each step: to write, to score, before the update, and when it is
    done."""

    def __init__(
        self,
        recipe: GrpoRecipe,
        setup: GrpoSetup,
        optimizer,
        state: State,
        step: int,
        display: StepDisplay,
        asked: Callable[[], int],
    ):
        self.asked = asked
        self.recipe, self.setup, self.optimizer, self.display = recipe, setup, optimizer, display
        self.state, self.step = state, step
        self.window = state.window.tokens
        self.responses: list[Response] = []
        self.clock = Stopwatch(setup.world.device)
        self.probe_flops: float = 0

    def write(self, places: list[str], trainer) -> dict[str, Any]:
        """Respond to the prompts at these places, each group in a row; before that, probe the
        window if it is due."""
        recipe, setup, step = self.recipe, self.setup, self.step
        torch.manual_seed(step_seed("step", recipe.grpo.seed, step))
        self.clock, self.probe_flops = Stopwatch(setup.world.device), 0
        setup.model.eval()
        if is_probe_due(recipe.window, self.state.window, step, reuse=1):
            with self.clock("probe_seconds"):
                probe, self.probe_flops = probe_grpo_window(recipe, setup, self.state.window, step)
            gate, decision = decide(recipe.window, self.state.window, probe)
            self.state = dataclasses.replace(self.state, window=gate)
            self.display.note(f"before step {step + 1}: {decision}")
            row: WindowRow = {"step": step + 1, **decision.as_row()}
            files.append(recipe.out / "window.jsonl", row)
        self.window = self.state.window.tokens
        if recipe.window.schedule == "linear":
            self.window = scheduled_window(recipe.window, step, recipe.grpo.steps)
        prompts = [setup.prompts[int(place)] for place in places]
        size = recipe.grpo.group_size
        seeds = [(recipe.grpo.seed, step, i // size, i % size) for i in range(len(prompts))]
        with self.clock("rollout_seconds"):
            self.responses = write(recipe, setup, prompts, seeds, self.window)
        setup.model.train()
        return {
            "prompt_ids": [list(prompt.token_ids) for prompt in prompts],
            "completion_ids": [list(response.completion.token_ids) for response in self.responses],
            "logprobs": [list(response.completion.log_probs) for response in self.responses],
        }

    def score(self, **columns: Any) -> list[float | None]:
        """The rewards of what was written last."""
        with self.clock("grading_seconds"):
            return [*score(self.setup.task, self.responses)]

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Refuse an update that is not finite."""
        gradients = [p.grad for p in self.setup.model.parameters() if p.grad is not None]
        if not math.isfinite(torch.nn.utils.get_total_norm(gradients).item()):
            ids = ", ".join(
                dict.fromkeys(response.prompt.example.id for response in self.responses[:64])
            )
            raise NonFiniteError(
                f"step {self.step + 1}: the gradient is not finite; nothing was updated. The "
                f"first prompts are {ids}. Look at them and at the model's logits, or lower "
                "grpo.lr"
            )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Log the step that is done, and save a checkpoint when one is due. TRL also logs the whole
        run at its end."""
        if logs is None or "loss" not in logs:
            return
        recipe, setup = self.recipe, self.setup
        rollouts = [response.rollout for response in self.responses]
        # The start model, which a KL is measured to, scores as a teacher does.
        parts = training_flops(
            rollouts, setup.flops, setup.flops if recipe.grpo.kl_weight else None
        )
        parts["rollout"] = rollout_flops(rollouts, {"student": setup.flops}, by_token=False)
        parts["probe"] = self.probe_flops
        self.state = dataclasses.replace(
            self.state, flops=self.state.flops + sum(parts[part] for part in FLOPS_PARTS)
        )
        self.step += 1
        rewards: OldRewards = {
            "reward": logs["reward"],
            "reward_std": logs["reward_std"],
            "groups_with_signal": 1 - logs["frac_reward_zero_std"],
        }
        if "kl" in logs:
            rewards["kl_to_start"] = logs["kl"]
        metrics: GrpoMetrics = {
            "step": self.step,
            "loss": logs["loss"],
            **rewards,
            **response_means(self.responses),
            "grad_norm": logs["grad_norm"],
            "lr": logs["learning_rate"],
            "window": self.window,
            "flops": parts,
            "total_flops": self.state.flops,
        }
        row: GrpoRow = {**metrics, **timing(self.display.lap(), self.clock.seconds)}
        row["student_seconds"] = round(row["seconds"] - sum(self.clock.seconds.values()), 4)
        files.append(recipe.out / "metrics.jsonl", row)
        signal = self.asked()
        if (
            self.step % recipe.grpo.checkpoint_every == 0
            or self.step == recipe.grpo.steps
            or signal
        ):
            data = dataclasses.asdict(self.state)
            checkpoint.save(recipe.out, self.step, setup.model, self.optimizer, setup.world, data)
        self.display.update(
            self.step,
            num_tokens=metrics["num_loss_tokens"],
            total_flops=self.state.flops,
            numbers=describe(metrics),
        )
        if signal:
            raise stopped_after(self.step, signal)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without what TRL and transformers say of themselves; errors are raised, not logged."""
    loggers = [logging.getLogger(name) for name in ("trl", "transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), without_progress_bars():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
