"""The commands about models: `potstill evaluate`, `sample`, `chat`, `merge`, `serve`
and `verify`."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from potstill.cli.overrides import refuse_overrides, server_options, template_arguments
from potstill.cli.usage import UsageError
from potstill.config import Evaluation, RecipeError, Sampling
from potstill.console.printable import say

# Shown as the defaults in help texts.
MULTIPLICATION = Evaluation(source="multiplication")
EXACT_SAMPLING = Sampling()


def evaluate(
    overrides: dict[str, Any],
    models: Positional[tuple[str, ...]],
    settings: OmitArgPrefixes[Evaluation] = MULTIPLICATION,
    out: Path | None = None,
    responses: Path | None = None,
    prompts: str | None = None,
    num_prompts: int | None = None,
    teacher: str | None = None,
    judge: str | None = None,
    engine: Literal["native", "vllm"] = "native",
) -> None:
    """Evaluate models or finished runs on held-out problems; compare each with the first.

    With --prompts no task scores the responses: a teacher does, or a judge of your own.

    Args:
        models: Run folders, model folders, hub ids, or potstill:teacher and potstill:base.
        out: Also write the results to this JSON file (one model). A run's results are added to
            its folder.
        responses: Folder for the responses of models that are no runs; an evaluation that was
            stopped goes on from them. Those of a run are in its own folder.
        prompts: File or data set of prompts, in place of a task: lengths, truncation, loops and
            entropy of what each model writes once to each prompt, at temperature 1.
        num_prompts: How many of them, the first ones; by default all.
        teacher: With --prompts: a model whose exact KLs to each model are measured, on what either
            writes, with all that a run's validation measures.
        judge: With --prompts: a function of yours that scores responses, as my_judge.py:helpful,
            whose code is run. It takes a list of potstill.Example and one of responses, and returns
            a number for each.
        engine: Who decodes. native: this process; vllm: a vLLM server, with --engine.python,
            --engine.args, --engine.url and --engine.timeout as in a recipe. Each has random
            numbers of its own.
    """
    from potstill.cli.show import evaluate_and_store, evaluate_without_task

    server = server_options(engine, overrides)
    settings = settings.model_copy(update=template_arguments(overrides))
    if not models:
        raise RecipeError("nothing to evaluate; give run folders, model folders, or potstill:base")
    if server is not None and server.url is not None and teacher is not None:
        raise UsageError("--engine.url is a server of one model, and --teacher writes too")
    if prompts is not None:
        _refuse_unread(settings, responses)
        _refuse_small(("num-prompts", 1 if num_prompts is None else num_prompts, 1))
        evaluate_without_task(
            models,
            settings,
            prompts,
            num=num_prompts,
            teacher=teacher,
            judge=judge,
            out=out,
            engine=server,
        )
        return
    for name, value in (("num-prompts", num_prompts), ("teacher", teacher), ("judge", judge)):
        if value is not None:
            raise UsageError(f"--{name} is read with --prompts FILE alone; give it, or remove it")
    if out is not None and len(models) > 1:
        raise RecipeError(
            f"--out takes the results of one model, and {len(models)} are given; leave it out, "
            "or evaluate each alone"
        )
    evaluate_and_store(models, settings, out, responses, server)


def _refuse_unread(settings: Evaluation, responses: Path | None) -> None:
    """Raise UsageError for an option that is not read with --prompts."""
    read = ("template", "template_arguments", "max_tokens", "end_tokens", "batch_size", "seed")
    for name, value in settings:
        if name not in read and value != getattr(MULTIPLICATION, name):
            raise UsageError(f"--{name.replace('_', '-')} is not read with --prompts; remove it")
    if responses is not None:
        raise UsageError("--responses is not read with --prompts; remove it")


def sample(
    overrides: dict[str, Any],
    model: Positional[str],
    prompt: tuple[str, ...] = (),
    source: str = "multiplication",
    template: Literal["chat", "raw"] | None = None,
    system: str | None = None,
    num: int = 4,
    max_tokens: int = 128,
    seed: int = 0,
    sampling: OmitArgPrefixes[Sampling] = EXACT_SAMPLING,
) -> None:
    """Show a few responses of a model.

    Args:
        model: A run folder, a model folder, a hub id, or potstill:teacher or potstill:base.
        prompt: Prompts; held-out problems of the source when there are none.
        source: The task to take problems from.
        template: Render the prompts with the chat template, or take them as they are. What it
            reads beside the messages is said by --template-arguments.NAME VALUE.
        system: System prompt before every chat.
        num: How many problems, or responses to each given prompt.
        max_tokens: Completion length cap.
        seed: Seed of the problems and of sampling.
    """
    from potstill.cli.show import show_responses

    told = template_arguments(overrides)
    _refuse_small(("num", num, 1), ("max-tokens", max_tokens, 1), ("seed", seed, 0))
    show_responses(
        model, prompt, source, template, num, max_tokens, seed, sampling, system=system, **told
    )


def chat(
    overrides: dict[str, Any],
    model: Positional[str],
    system: str | None = None,
    max_tokens: int = 512,
    seed: int = 0,
    sampling: OmitArgPrefixes[Sampling] = EXACT_SAMPLING,
) -> None:
    """Talk to a model, line by line, through its chat template.

    /new begins anew, /exit or Ctrl-D ends, and Ctrl-C stops an answer. A model without a chat
    template completes each line as it is. From a pipe each line is a turn.

    Args:
        model: A run folder, a model folder, a hub id, or potstill:teacher or potstill:base.
        system: A system message, which every conversation begins with. What the template reads
            beside the messages is said by --template-arguments.NAME VALUE.
        max_tokens: Cap on the length of an answer.
        seed: Seed of sampling.
    """
    from potstill.cli.chat import converse

    told = template_arguments(overrides)
    _refuse_small(("max-tokens", max_tokens, 1), ("seed", seed, 0))
    converse(model, system=system, max_tokens=max_tokens, seed=seed, sampling=sampling, **told)


def merge(
    overrides: dict[str, Any],
    model: Positional[str],
    out: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a model that is an adapter (LoRA) as a whole model.

    Args:
        model: A run folder, or a folder of peft, whose base is found by the name in it.
        out: Folder for the whole model, which is not there yet.
        dtype: Type of its weights.
    """
    from potstill.models.adapters import ADAPTER_CONFIG, merged_weights
    from potstill.models.language_model import load_model, locate, save_model

    refuse_overrides(overrides)
    if not (Path(locate(model)) / ADAPTER_CONFIG).exists():
        raise UsageError(f"{model!r} is whole already: it has no file {ADAPTER_CONFIG}")
    if out.exists():
        raise UsageError(f"--out {str(out)!r} is there already; remove it, or choose another")
    merged = load_model(model, dtype=dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(merged, merged_weights(merged.model), merged.end_ids, out)
    say(f"the whole model is in {out}")


def serve(
    overrides: dict[str, Any],
    model: Positional[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: Literal["float32", "bfloat16"] = "float32",
    token_variable: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serve a model's hidden states over HTTP, as teacher.url of other machines' runs.

    Speaks as a pooling server of vLLM does, and writes completions too. Needs the extra `serve`.

    Args:
        model: A run folder, a model folder, a hub id, or a shipped model such as potstill:teacher.
        host: Address to listen at; this machine alone by default. Any other wants a token.
        port: Port to listen at.
        dtype: Type of the weights.
        token_variable: Environment variable with the token that a client must give.
        trust_remote_code: Run Python code that the model's folder brings.
    """
    from potstill.serving.run import serve

    refuse_overrides(overrides)
    _refuse_small(("port", port, 1))
    serve(
        model,
        host=host,
        port=port,
        dtype=dtype,
        token_variable=token_variable,
        trust_remote_code=trust_remote_code,
    )


def verify(
    overrides: dict[str, Any],
    model: str | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Check the theory: each identity of docs/theory.md as a number, in seconds.

    Exits with 1 if one is broken.

    Args:
        model: Check a real model instead, as far as that needs no enumeration: a folder, hub id or
            run folder.
        json_file: Also write the rows to this JSON file.
    """
    from potstill.cli.show import print_checks
    from potstill.theory.identities import identities
    from potstill.theory.real_model import check_model

    refuse_overrides(overrides)
    if model is None:
        checks = list(identities())
    else:
        from potstill.models.probe import ready

        checks = check_model(ready(model))
    if not print_checks(checks, json_file):
        sys.exit(1)


def _refuse_small(*options: tuple[str, int, int]) -> None:
    """Raise UsageError for an option whose value is below its least."""
    for name, value, least in options:
        if value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}")
