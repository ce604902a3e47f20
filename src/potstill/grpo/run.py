"""Reinforcement learning after distillation: TRL's GRPOTrainer between our rollouts and our run
folder.

TRL does the update: advantages within each group, the policy gradient, clipping by norm. The rest
is ours, so that a GRPO run compares with a distillation: prompts in a seeded order, responses of
our decoder until our end set or the window, each from a random stream of its own, scores of the
task, metrics, checkpoints without pickle, and evaluation. Needs the extra `rl`. One process.
"""

import hashlib
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from potstill.checks.exploration import Start, verdict
from potstill.config import GrpoRecipe, RecipeError, check_recipe, run_evaluation
from potstill.console.boundary import saying_when_stopped, stop_asked_for, stopped_after
from potstill.console.progress import StepDisplay
from potstill.evaluation.scores import evaluate, evaluate_anew, prepare_problems
from potstill.grpo.responses import GrpoSetup, State, response_means, score, write
from potstill.grpo.trainer import Steps, hushed, make_grpo_trainer
from potstill.models import distributed
from potstill.models.distributed import World
from potstill.models.language_model import fingerprint, load_model, save_model
from potstill.models.probe import ready
from potstill.models.templates import today
from potstill.prompts.examples import load_task, make_prompts, prompt_notes
from potstill.prompts.overview import first_prompt, length_table
from potstill.prompts.system import system_notes, with_system
from potstill.runs import run_folder
from potstill.runs.card import write_card
from potstill.seeds import Stream, stream_key
from potstill.tasks.own import describe_files, own_files
from potstill.teachers.ends import describe_ends, end_set
from potstill.teachers.rope import refuse_crossing
from potstill.training import checkpoint
from potstill.training.controllers import WindowState, first_window
from potstill.training.setup import hold_out

# Prompts of the start check.
NUM_START_PROMPTS = 32


def run_grpo(recipe: GrpoRecipe, quiet: bool = False) -> Path:
    """Run a recipe, or resume it in its folder, and return the folder.

    Raises RecipeError, ModelError, DataError or RunError for bad input before anything is written,
    and NonFiniteError before a bad update.
    """
    check_recipe(recipe, GrpoRecipe)
    if importlib.util.find_spec("trl") is None:
        raise RecipeError("GRPO is done by TRL, which is not installed: pip install 'potstill[rl]'")
    world = distributed.start()
    if world.size > 1:
        raise RecipeError(
            f"GRPO runs in one process and torchrun started {world.size}; start it without torchrun"
        )
    if torch.cuda.device_count() > 1:
        raise RecipeError(
            f"GRPO uses one GPU and {torch.cuda.device_count()} are visible; set "
            "CUDA_VISIBLE_DEVICES=0"
        )
    run_folder.check_folder(recipe)
    if run_folder.is_trained(recipe.out, recipe):
        if not run_folder.is_done(recipe.out, recipe):
            evaluate_anew(recipe, load_model(str(recipe.out / "model")).to(world.device), quiet)
        return recipe.out
    with saying_when_stopped(lambda: checkpoint.what_is_saved(recipe.out)):
        setup = prepare_grpo(recipe, world)
        environment = recipe.out / "environment.json"
        # The start is measured once: a run that is resumed knows it.
        begun = run_folder.read_json(environment) if environment.exists() else {}
        start = begun.get("start") or measured_start(recipe, setup)
        with run_folder.open_run(recipe, _environment(setup) | {"start": start}) as notes:
            _run(recipe, setup, start, quiet, notes)
    return recipe.out


def prepare_grpo(recipe: GrpoRecipe, world: World) -> GrpoSetup:
    """Load the model and the prompts and check that they fit together. Writes nothing."""
    date = run_folder.begun_on(recipe.out) or today()
    model = ready(recipe.model, device=world.device)
    end_ids = end_set(model)
    data = recipe.data
    source = str(data.source)
    task, examples = load_task(
        source, split=data.split, num_examples=data.num_prompts, seed=data.seed
    )
    examples = with_system(examples, data.system, data.template)
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
    notes = length_table([source], examples, prompts, recipe.window.tokens)
    notes += system_notes(examples, data.system) + prompt_notes(
        len(examples), prompts, model.tokenizer, data.template, data.template_arguments
    )
    refuse_crossing(model, [p.token_ids for p in prompts], recipe.window.tokens, "window.tokens")
    prompts, probes = hold_out(recipe.window, prompts)
    if recipe.evaluation.source is not None:
        prepare_problems(model, run_evaluation(recipe), date)
    files = own_files(data.source, recipe.evaluation.source)
    return GrpoSetup(
        model=model,
        task=task,
        prompts=prompts,
        probes=probes,
        end_ids=end_ids,
        flops=model.flops,
        world=world,
        task_files=files,
        date=date,
        notes=tuple(notes),
    )


def measured_start(recipe: GrpoRecipe, setup: GrpoSetup) -> Start:
    """Whether the start checkpoint has anything to explore with, from a group of responses to each
    of some prompts.

    `entropy_before_answer` in nats a token, `score` the mean, `groups_with_signal` the share of
    groups whose responses do not all have one score, `num_groups`, `group_size`, and `truncation`
    by the first window.
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


def _run(
    recipe: GrpoRecipe,
    setup: GrpoSetup,
    start: Start,
    quiet: bool,
    notes: Sequence[str] = (),
) -> None:
    """All randomness follows from the number of finished steps and the seed."""
    config, folder, model = recipe.grpo, recipe.out, setup.model
    # A scheduler that goes on wants to find this key.
    group = {"params": list(model.parameters()), "initial_lr": config.lr}
    optimizer = torch.optim.AdamW([group], config.lr, weight_decay=0.0)
    step, state, logs = 0, State(first_window(recipe.window)), {}
    if (path := checkpoint.latest(folder)) is not None:
        saved = checkpoint.load(path, model, optimizer)
        step, logs = saved.step, saved.logs
        state = State(WindowState(**saved.state["window"]), saved.state["flops"])
    run_folder.rewind(folder, step, logs)
    checkpoint.tidy(folder, step)
    with StepDisplay(config.steps, step, quiet) as display, stop_asked_for() as asked:
        display.note(*_opening(recipe, setup, step), *verdict(start), *notes)
        if step < config.steps:
            steps = Steps(recipe, setup, optimizer, state, step, display, asked)
            with tempfile.TemporaryDirectory() as scratch, hushed():
                make_grpo_trainer(recipe, setup, optimizer, steps, scratch).train()
        # Asked for while the last step was saved.
        if signal := asked():
            raise stopped_after(config.steps, signal)
    weights = checkpoint.weights(model)
    # TRL changes the settings and the forward pass of the model that it trains; the one that is
    # saved is as it was.
    finished = load_model(recipe.model)
    finished.model.load_state_dict(weights, strict=False)
    save_model(finished, weights, setup.end_ids, folder / "model")
    if recipe.evaluation.source is not None:
        named = model.around(finished.model.to(setup.world.device), str(folder))
        options = {"end_ids": setup.end_ids, "responses": folder / "responses", "quiet": quiet}
        run_folder.store_evals(
            folder,
            config.steps,
            evaluate(named, run_evaluation(recipe), date=setup.date, **options),
        )
    write_card(folder)
    run_folder.mark_done(recipe)


def _environment(setup: GrpoSetup) -> dict[str, Any]:
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
            "student": {
                "name": model.name,
                "weights": fingerprint(model),
                "end_ids": list(model.end_ids),
            },
        },
    }


def _opening(recipe: GrpoRecipe, setup: GrpoSetup, step: int) -> list[str]:
    """Lines that a user should see before the first step."""
    tokenizer = setup.model.tokenizer
    lines = [
        f"GRPO from {recipe.model}: {recipe.out}" + (f", resumed after step {step}" if step else "")
    ]
    lines += describe_files(setup.task_files)
    lines.append(f"end set: {describe_ends(tokenizer, setup.end_ids)}")
    lines += recipe.notes
    lines += setup.notes
    return lines + first_prompt(setup.prompts, tokenizer)
