"""Reinforcement learning after distillation: TRL's GRPOTrainer between our rollouts and our run folder.

TRL does the update: advantages within each group, the policy gradient, clipping by norm. The rest is ours, so that a
GRPO run compares with a distillation: prompts in a seeded order, responses of our decoder until our end set or the
window, each from a random stream of its own, scores of the task, metrics, checkpoints without pickle, and evaluation.
Needs the extra `rl`. One process.
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback

from potstill import checkpoint, distributed, files, runlog
from potstill.boundary import stop_asked_for, stopped_after
from potstill.config import Grpo, GrpoRecipe, RecipeError, Train, check_recipe, run_evaluation
from potstill.controllers import Probe, WindowState, decide, first_window, is_probe_due, scheduled_window
from potstill.data import load_examples, make_prompts, prompt_notes
from potstill.distributed import World
from potstill.ends import described, end_set
from potstill.evaluation import evaluate, evaluate_anew, prepare_problems
from potstill.flops import ModelFlops, rollout_flops, training_flops
from potstill.metrics import Stopwatch
from potstill.models import LanguageModel, fingerprint, load_model, save_model, without_progress_bars
from potstill.opening import SHOWN_CHARACTERS
from potstill.probe import ready
from potstill.progress import StepDisplay
from potstill.rates import learning_rate
from potstill.rope import refuse_crossing
from potstill.sampling import sample
from potstill.seeds import Key, Stream, step_indices, step_seed, stream_key
from potstill.setup import hold_out
from potstill.tasks import Task, make_task
from potstill.tasks.own import describe_files, own_files
from potstill.templates import today
from potstill.text import is_loop, num_tokens_to_answer, zlib_ratio
from potstill.types import Completion, NonFiniteError, Prompt, Rollout

# Prompts of the start check.
NUM_START_PROMPTS = 32
# Below these the start checkpoint has little to explore with: entropy in nats a token, share of groups that disagree.
LOW_ENTROPY, FEW_GROUPS = 0.05, 0.1


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, loaded and checked before anything is written."""

    model: LanguageModel
    task: Task
    prompts: list[Prompt]
    probes: list[Prompt]
    end_ids: tuple[int, ...]
    flops: ModelFlops
    world: World
    task_files: dict[str, str]
    date: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Response:
    """What the model wrote after a prompt, as text, and how many of its tokens come up to the first answer."""

    prompt: Prompt
    completion: Completion
    text: str
    num_before_answer: int

    @property
    def rollout(self) -> Rollout:
        num = len(self.completion.token_ids)
        stop = self.completion.stop
        return Rollout(self.prompt, self.completion.token_ids, (True,) * num, ("student",) * num, stop)


@dataclass(frozen=True)
class State:
    """What a run carries from step to step beside weights and optimiser; in checkpoints, as plain data."""

    window: WindowState
    flops: float = 0.0


def run_grpo(recipe: GrpoRecipe, quiet: bool = False) -> Path:
    """Run a recipe, or resume it in its folder, and return the folder.

    Raises RecipeError, ModelError, DataError or RunError for bad input before anything is written, and NonFiniteError
    before a bad update.
    """
    check_recipe(recipe, GrpoRecipe)
    if importlib.util.find_spec("trl") is None:
        raise RecipeError("GRPO is done by TRL, which is not installed: pip install 'potstill[rl]'")
    world = distributed.start()
    if world.size > 1:
        raise RecipeError(f"GRPO runs in one process and torchrun started {world.size}; start it without torchrun")
    if torch.cuda.device_count() > 1:
        raise RecipeError(f"GRPO uses one GPU and {torch.cuda.device_count()} are visible; set CUDA_VISIBLE_DEVICES=0")
    runlog.check_folder(recipe)
    if runlog.is_trained(recipe.out, recipe):
        if not runlog.is_done(recipe.out, recipe):
            evaluate_anew(recipe, load_model(str(recipe.out / "model")).to(world.device), quiet)
        return recipe.out
    with checkpoint.told_when_stopped(recipe.out):
        setup = prepare(recipe, world)
        environment = recipe.out / "environment.json"
        # The start is measured once: a run that is resumed knows it.
        begun = runlog.read_json(environment) if environment.exists() else {}
        start = begun.get("start") or measure_start(recipe, setup)
        with runlog.open_run(recipe, _environment(setup) | {"start": start}) as notes:
            _run(recipe, setup, start, quiet, notes)
    return recipe.out


def prepare(recipe: GrpoRecipe, world: World) -> Setup:
    """Load the model and the prompts and check that they fit together. Writes nothing."""
    date = runlog.begun_on(recipe.out) or today()
    model = ready(recipe.model, device=world.device)
    end_ids = end_set(model)
    data = recipe.data
    examples = load_examples(data.source, split=data.split, num_examples=data.num_prompts, seed=data.seed)
    prompts = make_prompts(
        examples,
        model.tokenizer,
        template=data.template,
        max_completion=recipe.window.tokens,
        context_length=model.context_length,
        template_arguments=data.template_arguments,
        date=date,
        max_prompt_tokens=data.max_prompt_tokens,
        too_long=data.too_long,
    )
    notes = prompt_notes(len(examples), prompts, model.tokenizer, data.template, data.template_arguments)
    refuse_crossing(model, [p.token_ids for p in prompts], recipe.window.tokens, "window.tokens")
    prompts, probes = hold_out(recipe.window, prompts)
    if recipe.evaluation.source is not None:
        prepare_problems(model, run_evaluation(recipe), date)
    task = make_task(str(data.source))
    files = own_files(data.source, recipe.evaluation.source)
    return Setup(model, task, prompts, probes, end_ids, model.flops, world, files, date, tuple(notes))


def measure_start(recipe: GrpoRecipe, setup: Setup) -> dict[str, float]:
    """Whether the start checkpoint has anything to explore with, from a group of responses to each of some prompts.

    `entropy_before_answer` in nats a token, `score` the mean, `groups_with_signal` the share of groups whose responses
    do not all have one score, `num_groups`, `group_size`, and `truncation` by the first window.
    """
    group_size = recipe.grpo.group_size
    chosen = [prompt for prompt in setup.prompts[:NUM_START_PROMPTS] for _ in range(group_size)]
    places = [divmod(i, group_size) for i in range(len(chosen))]
    seeds = [stream_key((recipe.grpo.seed, 0, *place), Stream.START) for place in places]
    responses = write(recipe, setup, chosen, seeds, first_window(recipe.window).tokens)
    scores = score(setup.task, responses)
    means = response_means(responses)
    groups = [scores[i : i + group_size] for i in range(0, len(scores), group_size)]
    return {
        "entropy_before_answer": means["student_entropy_before_answer"],
        "score": sum(scores) / len(scores),
        "groups_with_signal": sum(len(set(group)) > 1 for group in groups) / len(groups),
        "truncation": means["truncation"],
        "num_groups": len(groups),
        "group_size": group_size,
    }


def verdict(start: dict[str, float]) -> list[str]:
    """The numbers of `measure_start` in plain words, and a warning where there is little to learn from."""
    entropy, share = start["entropy_before_answer"], start["groups_with_signal"]
    found = (
        f"start: entropy before the answer {entropy:.3f} nats, mean score {start['score']:.1%}, cut by the window "
        f"{start['truncation']:.0%}; responses differ in score in {share:.0%} of "
        f"{start['num_groups']} groups of {start['group_size']}, and only these give a gradient"
    )
    warned = []
    if share < FEW_GROUPS:
        too = "hard" if start["score"] < 0.5 else "easy"
        warned.append(
            f"warning: almost no group disagrees, so there is almost no gradient: the prompts are too {too} for this "
            "model; take other prompts, a larger grpo.group_size or another start"
        )
    if entropy < LOW_ENTROPY:
        warned.append(
            f"warning: the entropy is near 0 (below {LOW_ENTROPY:g} nats), so that responses hardly differ; start "
            "from a checkpoint that kept its entropy (forward KL keeps it), or raise sampling.temperature"
        )
    return [found + ("" if warned else ": there is entropy to explore with"), *warned]


def write(
    recipe: GrpoRecipe, setup: Setup, prompts: Sequence[Prompt], seeds: Sequence[Key], window: int
) -> list[Response]:
    """Let the model as it is now respond to each prompt, up to the window."""
    model = setup.model
    completions = sample(
        model.model,
        [prompt.token_ids for prompt in prompts],
        seeds,
        max_tokens=window,
        end_ids=setup.end_ids,
        sampling=recipe.sampling,
    )
    texts = model.tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
    return [
        Response(prompt, c, text, num_tokens_to_answer(c.token_ids, text, model.tokenizer, setup.task.answer_end))
        for prompt, c, text in zip(prompts, completions, texts, strict=True)
    ]


def score(task: Task, responses: Sequence[Response]) -> list[float]:
    """The task's score of each response, which is the reward."""
    grades = task.grade([response.prompt.example for response in responses], [response.text for response in responses])
    return [grade.score for grade in grades]


def response_means(responses: Sequence[Response]) -> dict[str, float]:
    """Means per token (nats, of the distribution sampled from) and per response, by the names of the run log."""
    num_tokens = sum(len(response.completion.token_ids) for response in responses)
    num_before_answer = sum(response.num_before_answer for response in responses)
    before = [sum(response.completion.entropies[: response.num_before_answer]) for response in responses]
    return {
        "student_entropy": sum(sum(response.completion.entropies) for response in responses) / num_tokens,
        "student_entropy_before_answer": sum(before) / num_before_answer,
        "length": num_tokens / len(responses),
        "truncation": sum(response.completion.stop == "length" for response in responses) / len(responses),
        "zlib_ratio": sum(zlib_ratio(response.text) for response in responses) / len(responses),
        "num_loss_tokens": num_tokens,
    }


def probe_window(recipe: GrpoRecipe, setup: Setup, state: WindowState, step: int) -> tuple[Probe, int]:
    """What the length gate looks at: one response to each held-out prompt. Also the operations that this took."""
    seeds = [stream_key((recipe.grpo.seed, step, place, 0), Stream.PROBE) for place in range(len(setup.probes))]
    responses = write(recipe, setup, setup.probes, seeds, state.tokens)
    means = response_means(responses)
    probe = Probe(
        entropy=means["student_entropy_before_answer"],
        teacher_entropy=None,
        truncation=means["truncation"],
        teacher_truncation=0.0,
        repetition=sum(is_loop(response.text) for response in responses) / len(responses),
    )
    return probe, rollout_flops([r.rollout for r in responses], {"student": setup.flops}, by_token=False)


def _run(recipe: GrpoRecipe, setup: Setup, start: dict[str, float], quiet: bool, notes: Sequence[str] = ()) -> None:
    """All randomness follows from the number of finished steps and the seed."""
    config, folder, model = recipe.grpo, recipe.out, setup.model
    # What a scheduler that goes on wants to find.
    group = {"params": list(model.parameters()), "initial_lr": config.lr}
    optimizer = torch.optim.AdamW([group], config.lr, weight_decay=0.0)
    step, state, logs = 0, State(first_window(recipe.window)), {}
    if (path := checkpoint.latest(folder)) is not None:
        saved = checkpoint.load(path, model, optimizer)
        step, logs = saved.step, saved.logs
        state = State(WindowState(**saved.state["window"]), saved.state["flops"])
    runlog.rewind(folder, step, logs)
    checkpoint.tidy(folder, step)
    with StepDisplay(config.steps, step, quiet) as display, stop_asked_for() as asked:
        display.note(*_opening(recipe, setup, step), *verdict(start), *notes)
        if step < config.steps:
            steps = _Steps(recipe, setup, optimizer, state, step, display, asked)
            with tempfile.TemporaryDirectory() as scratch, _hushed():
                _make_trainer(recipe, setup, optimizer, steps, scratch).train()
    weights = checkpoint.weights(model)
    # TRL changes the settings and the forward pass of the model that it trains; the one that is saved is as it was.
    finished = load_model(recipe.model)
    finished.model.load_state_dict(weights, strict=False)
    save_model(finished, weights, setup.end_ids, folder / "model")
    if recipe.evaluation.source is not None:
        named = model.around(finished.model.to(setup.world.device), str(folder))
        options = {"end_ids": setup.end_ids, "responses": folder / "responses", "quiet": quiet}
        runlog.store_evals(folder, config.steps, evaluate(named, run_evaluation(recipe), date=setup.date, **options))
    runlog.finish(recipe)


def _make_trainer(recipe: GrpoRecipe, setup: Setup, optimizer: torch.optim.Optimizer, steps: "_Steps", scratch: str):
    """TRL's trainer of the steps that are left. Its data set is the places of the prompts, step after step."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    config = recipe.grpo
    num_responses = config.prompts_per_step * config.group_size
    rows = max(n for n in range(1, min(config.rows_per_batch, num_responses) + 1) if num_responses % n == 0)
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
    # A copy, which TRL gives a padding token where it has none: the first end token. Masks come from lengths.
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
    rates = Train(steps=config.steps, lr=config.lr, schedule=config.schedule, warmup_steps=config.warmup_steps)
    return LambdaLR(optimizer, lambda step: learning_rate(rates, step) / config.lr, last_epoch=start - 1)


class _Steps(TrainerCallback):
    """What TRL calls in each step: to write, to score, before the update, and when it is done."""

    def __init__(
        self,
        recipe: GrpoRecipe,
        setup: Setup,
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
        self.probe_flops = 0

    def write(self, places: list[str], trainer) -> dict[str, Any]:
        """Respond to the prompts at these places, each group in a row; before that, probe the window if it is due."""
        recipe, setup, step = self.recipe, self.setup, self.step
        torch.manual_seed(step_seed("step", recipe.grpo.seed, step))
        self.clock, self.probe_flops = Stopwatch(setup.world.device), 0
        setup.model.eval()
        if is_probe_due(recipe.window, self.state.window, step, reuse=1):
            with self.clock("probe"):
                probe, self.probe_flops = probe_window(recipe, setup, self.state.window, step)
            gate, decision = decide(recipe.window, self.state.window, probe)
            self.state = dataclasses.replace(self.state, window=gate)
            self.display.note(f"before step {step + 1}: {decision}")
            files.append(recipe.out / "window.jsonl", {"step": step + 1, **decision.as_row()})
        self.window = self.state.window.tokens
        if recipe.window.schedule == "linear":
            self.window = scheduled_window(recipe.window, step, recipe.grpo.steps)
        prompts = [setup.prompts[int(place)] for place in places]
        size = recipe.grpo.group_size
        seeds = [(recipe.grpo.seed, step, i // size, i % size) for i in range(len(prompts))]
        with self.clock("rollout"):
            self.responses = write(recipe, setup, prompts, seeds, self.window)
        setup.model.train()
        return {
            "prompt_ids": [list(prompt.token_ids) for prompt in prompts],
            "completion_ids": [list(response.completion.token_ids) for response in self.responses],
            "logprobs": [list(response.completion.log_probs) for response in self.responses],
        }

    def score(self, **columns: Any) -> list[float | None]:
        """The rewards of what was written last."""
        with self.clock("grading"):
            return [*score(self.setup.task, self.responses)]

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Refuse an update that is not finite."""
        gradients = [p.grad for p in self.setup.model.parameters() if p.grad is not None]
        if not math.isfinite(torch.nn.utils.get_total_norm(gradients).item()):
            ids = ", ".join(dict.fromkeys(response.prompt.example.id for response in self.responses[:64]))
            raise NonFiniteError(
                f"step {self.step + 1}: the gradient is not finite; nothing was updated. The first prompts are {ids}. "
                "Look at them and at the model's logits, or lower grpo.lr"
            )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Log the step that is done, and save a checkpoint when one is due. TRL also logs the whole run at its end."""
        if logs is None or "loss" not in logs:
            return
        recipe, setup = self.recipe, self.setup
        rollouts = [response.rollout for response in self.responses]
        # The start model, which a KL is measured to, scores as a teacher does.
        parts = training_flops(rollouts, setup.flops, setup.flops if recipe.grpo.kl_weight else None)
        parts["rollout"] = rollout_flops(rollouts, {"student": setup.flops}, by_token=False)
        parts["probe"] = self.probe_flops
        self.state = dataclasses.replace(self.state, flops=self.state.flops + sum(parts.values()))
        self.step += 1
        metrics = {"step": self.step, "loss": logs["loss"]}
        metrics |= {"reward": logs["reward"], "reward_std": logs["reward_std"]}
        metrics["groups_with_signal"] = 1 - logs["frac_reward_zero_std"]
        metrics |= {"kl_to_start": logs["kl"]} if "kl" in logs else {}
        metrics |= response_means(self.responses)
        metrics |= {"grad_norm": logs["grad_norm"], "lr": logs["learning_rate"], "window": self.window}
        metrics |= {"flops": parts, "total_flops": self.state.flops}
        timing = self.display.timing(self.clock.seconds)
        timing["student_seconds"] = round(timing["seconds"] - sum(self.clock.seconds.values()), 4)
        files.append(recipe.out / "metrics.jsonl", metrics | timing)
        signal = self.asked()
        if self.step % recipe.grpo.checkpoint_every == 0 or self.step == recipe.grpo.steps or signal:
            data = dataclasses.asdict(self.state)
            checkpoint.save(recipe.out, self.step, setup.model, self.optimizer, setup.world, data)
        self.display.update(metrics)
        if signal:
            raise stopped_after(self.step, signal)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
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


def _environment(setup: Setup) -> dict[str, Any]:
    model = setup.model
    prompts = [(prompt.token_ids, prompt.example.answer) for prompt in setup.prompts]
    return {
        "world_size": setup.world.size,
        "device": str(setup.world.device),
        "date": setup.date,
        "task_files": setup.task_files,
        "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
        "end_ids": list(setup.end_ids),
        "models": {
            "student": {"name": model.name, "weights": fingerprint(model), "end_ids": list(model.end_ids)},
        },
    }


def _opening(recipe: GrpoRecipe, setup: Setup, step: int) -> list[str]:
    """What a user should see before the first step."""
    tokenizer = setup.model.tokenizer
    lines = [f"GRPO from {recipe.model}: {recipe.out}" + (f", resumed after step {step}" if step else "")]
    lines += describe_files(setup.task_files)
    lines.append(f"end set: {described(tokenizer, setup.end_ids)}")
    lines += recipe.notes
    lines += setup.notes
    text = tokenizer.decode(setup.prompts[0].token_ids)
    lines.append(f"first of {len(setup.prompts)} prompts: {text[:SHOWN_CHARACTERS]!r}")
    return lines
