"""The work of `potstill evaluate`, `sample` and `verify` on what the library computes, and what
they print."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from potstill.config import EngineSpec, Evaluation, Sampling
from potstill.console.boundary import STOPPED_AND_SAVED, saying_when_stopped
from potstill.console.printable import plain, say
from potstill.engines.make import refuse_missing_program
from potstill.evaluation.on_prompts import OnPrompts, evaluate_on_prompts, read_prompts
from potstill.evaluation.scores import evaluate, make_problems
from potstill.files import write_json
from potstill.models.language_model import is_run, locate
from potstill.models.probe import ready
from potstill.models.sampling import sample
from potstill.prompts.examples import make_prompts, prompt_notes
from potstill.prompts.system import with_system
from potstill.report.terminal import print_table
from potstill.report.validation import comparison_lines, validation_lines
from potstill.runs.card import write_card
from potstill.runs.results import Entry, read_entry
from potstill.runs.run_folder import begun_on, last_row, read_json, store_evals
from potstill.seeds import Stream, stream_key
from potstill.statistics import holm, paired
from potstill.tasks.own import OwnJudge, describe_files, own_files
from potstill.teachers.ends import end_set
from potstill.teachers.rope import refuse_crossing
from potstill.teachers.vocabulary import num_named_rows
from potstill.theory.check import Check
from potstill.types import Example

# A share of responses, above which their cap is what is measured.
MOSTLY = 0.5
UNSAVED = "stopped; nothing was saved: with --responses FOLDER an evaluation can go on"


def evaluate_and_store(
    models: Sequence[str],
    evaluation: Evaluation,
    out: Path | None = None,
    responses: Path | None = None,
    engine: EngineSpec | None = None,
) -> None:
    """Evaluate several models, print the comparison and its tests, and store each run's results in
    its folder.

    Responses go to each run's folder `responses`, and those of other models to the folder
    `responses`, if given. With an `engine` a server of it writes for each model.
    """
    for model in models:
        locate(model)
    # The steps of runs are read before anything is sampled.
    steps = [last_row(Path(model))["step"] if is_run(Path(model)) else None for model in models]
    entries = []
    for model, step in zip(models, steps, strict=True):
        target = Path(model)
        folder, date = (
            (responses, None) if step is None else (target / "responses", begun_on(target))
        )
        saved = UNSAVED if folder is None else STOPPED_AND_SAVED
        with saying_when_stopped(lambda saved=saved: saved):
            rows = evaluate(model, evaluation, responses=folder, date=date, engine=engine)
        if step is not None:
            store_evals(target, step, rows)
            write_card(target)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, rows)
        entries.append(Entry(name=str(target).removeprefix("potstill:"), path=target, evals=rows))
    print_table(entries)
    say(*gave_up(entries), *cut_short(entries, evaluation.max_tokens), *comparisons(entries))


def evaluate_without_task(
    models: Sequence[str],
    settings: Evaluation,
    source: str,
    *,
    num: int | None = None,
    teacher: str | None = None,
    judge: str | None = None,
    out: Path | None = None,
    engine: EngineSpec | None = None,
) -> None:
    """Measure several models on prompts of a file or data set, and print them beside each other."""
    for model in (*models, *([] if teacher is None else [teacher])):
        locate(model)
    refuse_missing_program(engine)
    say(*describe_files(own_files(judge)), error=True)
    judging = None if judge is None else OwnJudge(judge)
    asked = OnPrompts(
        examples=read_prompts(source, num),
        source=source,
        settings=settings,
        teacher=None if teacher is None else ready(teacher).eval(),
        judge=judging,
        engine=engine,
    )
    rows = []
    for model in models:
        date = begun_on(Path(model)) if is_run(Path(model)) else None
        row, notes = evaluate_on_prompts(model, asked, date)
        say(*notes, error=True)
        rows.append(row)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, rows)
    say(*comparison_lines(rows))


def gave_up(entries: Sequence[Entry]) -> list[str]:
    """Where grading ended before it had an answer; these responses scored 0."""
    lines = []
    for entry in entries:
        for row in entry.evals:
            counts = {
                note: row["notes"][note]
                for note in ("timeout", "crash", "too long")
                if note in row["notes"]
            }
            if counts:
                described = ", ".join(f"{note} {num}" for note, num in counts.items())
                lines.append(
                    f"{entry.name} at T={row['temperature']:g}: grading gave up on responses: "
                    f"{described}"
                )
    return lines


def cut_short(entries: Sequence[Entry], max_tokens: int) -> list[str]:
    """Where the cap ended most responses, whose score then says little of the model."""
    lines = []
    for entry in entries:
        for row in entry.evals:
            share, *_ = row["truncation"]
            if share > MOSTLY:
                lines.append(
                    f"{entry.name} at T={row['temperature']:g}: {share:.0%} of the responses were "
                    f"cut at {max_tokens} tokens, most of them before an answer: raise --max-tokens"
                )
    return lines


def comparisons(entries: Sequence[Entry]) -> list[str]:
    """Each model against the first on the same problems, at each temperature; p-values corrected
    over all of them.

    The last line says what the intervals are about; there is none without another model.
    """
    first, *others = entries
    if not others:
        return []
    pairs = []
    for other in others:
        for a, b in zip(first.evals, other.evals, strict=True):
            # The scores are of one evaluation, whose problems have the same places for all models.
            mine, theirs = a["problems"]["score"], b["problems"]["score"]
            pairs.append((other.name, a["temperature"], paired(theirs, mine)))
    corrected = holm([result.p_value for _, _, result in pairs])
    lines = [
        f"{name} - {first.name} at T={temperature:g}: {100 * result.difference.value:+.1f} "
        f"points [{100 * result.difference.low:+.1f}, {100 * result.difference.high:+.1f}] "
        f"(paired bootstrap over problems), p = {p:.2g} (Wilcoxon, Holm over {len(pairs)})"
        for (name, temperature, result), p in zip(pairs, corrected, strict=True)
    ]
    note = (
        "Intervals and p-values are over problems alone: they are about these models, and "
        "not about how they were "
    )
    return [*lines, note + "trained, for which it takes at least three seeds of each."]


def show_responses(
    model_name: str,
    given: Sequence[str],
    source: str,
    template: Literal["chat", "raw"] | None,
    num: int,
    max_tokens: int,
    seed: int,
    sampling: Sampling,
    system: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> None:
    """Print `num` responses: to problems of a task with their scores, or to each of the given
    prompts."""
    from rich.console import Console

    task, examples = (
        None,
        [Example(id=str(i), prompt=p) for i, p in enumerate(given) for _ in range(num)],
    )
    if not given:
        task, examples = make_problems(Evaluation(source=source, num_problems=num, seed=seed))
    model = ready(model_name)
    prompts = make_prompts(
        with_system(examples, system, template),
        model.tokenizer,
        template=template,
        max_completion=max_tokens,
        context_length=model.context_length,
        template_arguments=template_arguments,
    )
    refuse_crossing(model, [p.token_ids for p in prompts], max_tokens, "--max-tokens")
    say(*describe_files(own_files(None if given else source)), error=True)
    say(
        *prompt_notes(len(prompts), prompts, model.tokenizer, template, template_arguments),
        error=True,
    )
    completions = sample(
        model.model,
        [prompt.token_ids for prompt in prompts],
        [stream_key((seed, i, 0), Stream.SAMPLE) for i in range(len(prompts))],
        max_tokens=max_tokens,
        end_ids=end_set(model),
        sampling=sampling,
        vocab_size=num_named_rows(model),
    )
    console = Console()
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        text = model.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        facts = [f"{len(completion.token_ids)} tokens", f"stopped by {completion.stop}"]
        facts.append(f"entropy {sum(completion.entropies) / len(completion.entropies):.3f} nats")
        if task is not None:
            facts.append(
                f"score {task.grade([example], [text])[0].score:g}, answer {example.answer}"
            )
        console.print(
            plain(model.tokenizer.decode(prompt.token_ids), "dim"), plain(text, "bold"), sep=""
        )
        console.print(plain("  " + ", ".join(facts)))


def print_checks(checks: list[Check], json_file: Path | None = None) -> bool:
    """Print one row a check, write them to a JSON file if asked, and say whether all hold."""
    from rich.console import Console
    from rich.table import Table as Rows

    table = Rows(title="identities, in float64")
    table.add_column("identity")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("allowed", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for check in checks:
        sign = ">=" if check.differs else "<="
        verdict = "ok" if check.holds else "[bold]BROKEN[/]"
        table.add_row(plain(check.name), f"{check.error:.1e}", f"{sign} {check.bound:g}", verdict)
    Console().print(table)
    num_broken = sum(not check.holds for check in checks)
    say(f"{num_broken} of {len(checks)} are broken" if num_broken else f"all {len(checks)} hold")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**dataclasses.asdict(check), "holds": check.holds} for check in checks]
        write_json(json_file, rows)
    return not num_broken


def print_results(folders: list[Path]) -> None:
    """Print the comparison table of runs and evaluation files that hold an evaluation; of other
    runs the last validation; and where the best students are."""
    entries = [read_entry(folder) for folder in folders]
    for entry in entries:
        say(*describe_best(entry))
        if not entry.evals:
            say(*validation_lines(entry))
    evaluated = [entry for entry in entries if entry.evals]
    if evaluated:
        print_table(evaluated)


def describe_best(entry: Entry) -> list[str]:
    """Where the best student of a run is and how good, where the run has kept it."""
    file = entry.path / "best" / "validation.json"
    if entry.recipe is None or not file.exists():
        return []
    goal = str(entry.recipe.validation.keep_best)
    row = read_json(file, ("step", goal))
    value, low, high = row[goal]
    return [
        f"the best by {goal}, {value:.4g} [{low:.4g}, {high:.4g}], after step {row['step']}, is in "
        f"{file.parent}"
    ]
