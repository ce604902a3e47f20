"""The model card of a run's student: `model/README.md`, from what the run folder holds.

Names and settings in it come from recipes, models and files, which anybody can have written: each
stands as code, where it can be no markup.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.config import Recipe, load_recipe, to_toml
from potstill.console.printable import one_line, printable
from potstill.files import write_atomically
from potstill.runs.quantities import SHOWN
from potstill.runs.results_schema import EVAL_COLUMNS
from potstill.runs.run_folder import (
    STEP_LOGS,
    last_row,
    read_evals,
    read_json,
    read_validations,
)
from potstill.runs.schema import ValidationRow, quantity_in

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Columns of an evaluation: key, title and scale.
EVALUATED = (
    ("avg", "Avg@{n} (%)", 100.0),
    ("entropy_before_answer", "entropy up to the answer (nats)", 1.0),
    ("length", "length (tokens)", 1.0),
    ("truncation", "cut at the length cap (%)", 100.0),
)
CITATION = """\
@misc{decoupling-kl-and-trajectories,
  title = {Decoupling KL and Trajectories},
  eprint = {2605.16826},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2605.16826}
}"""


def write_card(folder: Path, repo_id: str | None = None) -> None:
    """Write the card of the model in a run folder, in place of one that is there.

    `repo_id` is the name under which the hub has the model; else the card names its folder.
    """
    recipe = load_recipe(folder / "recipe.toml")
    environment = read_json(folder / "environment.json", ("models",))
    models = {role: str(model["name"]) for role, model in environment["models"].items()}
    step = last_row(folder)["step"]
    evals = read_evals(folder, ("step", *EVAL_COLUMNS))
    evals = [row for row in evals if row["step"] == step]
    validations = read_validations(folder, STEP_LOGS["validation.jsonl"])
    validations = [row for row in validations if row["step"] == step]
    lines = [
        "---",
        _front_matter(recipe, models).rstrip(),
        "---",
        "",
        f"# {code(folder.resolve().name)}",
        "",
        *_about(recipe, models, step),
        "",
        "## Numbers",
        "",
        *_evaluated(evals),
        *_validated(validations[-1] if validations else None),
        *([] if evals or validations else ["The student was not evaluated.", ""]),
        "## Use",
        "",
        *_use(repo_id or str(folder / "model")),
        "",
        "## Recipe",
        "",
        *fenced("toml", to_toml(recipe.resolved_without(("out",))).rstrip()),
        "",
        "## Citation",
        "",
        "The axes of the method are those of [arXiv 2605.16826](https://arxiv.org/abs/2605.16826):",
        "",
        *fenced("bibtex", CITATION),
    ]
    write_atomically(folder / "model" / CARD, "\n".join(lines) + "\n")


def code(text: object) -> str:
    """A text as a code span on one line, also in a cell of a table."""
    line = one_line(text).replace("|", "\\|") or " "
    fence = "`" * (_longest_run(line) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def fenced(language: str, text: str) -> list[str]:
    """A text as a block of code, which nothing in it ends."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}{language}", *printable(text).split("\n"), fence]


def _longest_run(text: str) -> int:
    """The most backticks in a row."""
    return max(map(len, re.findall("`+", text)), default=0)


def _front_matter(recipe: Recipe, models: Mapping[str, str]) -> str:
    from huggingface_hub import ModelCardData

    base = models["student"]
    is_hub_id = HUB_ID.fullmatch(base) is not None and not Path(base).exists()
    kinds = ["distillation"] if recipe.objective.kl != "none" else []
    kinds += ["reinforcement-learning"] if recipe.reward.weight else []
    lora = recipe.student.lora
    kinds += [] if lora.rank is None else ["lora"]
    is_adapter = lora.rank is not None and lora.save == "adapter"
    card = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        # The hub takes no folder of somebody's machine.
        base_model=base if is_hub_id else None,
        tags=["potstill", *kinds],
    )
    return card.to_yaml(line_break="\n")


def _about(recipe: Recipe, models: Mapping[str, str], step: int) -> list[str]:
    """Lines on what was trained, how, and on what."""
    is_distilled = recipe.objective.kl != "none"
    if not is_distilled:
        said = "A language model trained by reinforcement learning with potstill."
    elif recipe.reward.weight:
        said = "A language model distilled from another one and rewarded with potstill."
    else:
        said = "A language model distilled from another one with potstill."
    rows = [
        ("student" if is_distilled else "started from", code(models["student"])),
        ("method", code(recipe.method)),
    ]
    if is_distilled:
        rows += [
            ("teacher", _teacher(recipe, models)),
            *((role, code(name)) for role, name in models.items() if role.startswith("teacher ")),
            ("who wrote the prefixes", code(recipe.objective.prefix)),
            ("KL", code(recipe.objective.kl)),
        ]
    rows += [
        ("prompts", code(_prompts(recipe))),
        ("steps", f"{step:,}"),
        ("longest completion in training", f"{recipe.window.tokens:,} tokens"),
    ]
    table = [f"| {name} | {value} |" for name, value in rows]
    licences = "The licences of the models and of the data that it was made from hold for it too."
    return [said, "", "| | |", "|---|---|", *table, "", licences]


def _teacher(recipe: Recipe, models: Mapping[str, str]) -> str:
    """The first teacher: its name, or how it follows the student that it is."""
    spec = recipe.teacher
    if "teacher" not in models:
        return "none"
    if spec.model != "self":
        return code(models["teacher"])
    how = "as it was at first"
    if spec.ema is not None:
        how = f"as a moving average that keeps {spec.ema:g} of itself a step"
    elif spec.refresh_steps is not None:
        how = f"as it was at first and after each {spec.refresh_steps:,} steps"
    reads_more = spec.prompt_template is not None or spec.prompt_column is not None
    return f"the student itself, {how}" + (", with prompts of its own" if reads_more else "")


def _prompts(recipe: Recipe) -> str:
    source = recipe.data.origin
    return source if isinstance(source, str) else ", ".join(source)


def _evaluated(evals: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for each evaluation of the student."""
    lines: list[str] = []
    for row in evals:
        num, settings = row["num_responses"], row["settings"]
        quantities = [(key, title.format(n=num), scale) for key, title, scale in EVALUATED]
        found = [(title, row[key], scale) for key, title, scale in quantities if row.get(key)]
        best = row["pass"][str(num)]
        found.insert(1, (f"Pass@{num} (%)", best, 100.0))
        lines += [
            f"{code(settings.get('source'))}, {code(settings.get('split', 'test'))}: "
            f"{row['num_problems']:,} problems, {num:,} responses each at temperature "
            f"{row['temperature']:g}",
            "",
            *_estimates(found, row["num_problems"], "problems"),
            "",
        ]
    return lines


def _validated(row: ValidationRow | None) -> list[str]:
    """A table of the last validation."""
    if row is None:
        return []
    known = [(shown, quantity_in(row, name)) for name, shown in SHOWN.items()]
    found = [(shown.title, value, shown.scale) for shown, value in known if value is not None]
    intro = (
        f"Both models on {row['num_prompts']:,} prompts that were not trained on, with completions "
        f"of at most {row['max_tokens']:,} tokens"
    )
    return [intro, "", *_estimates(found, row["num_prompts"], "prompts"), ""]


def _estimates(
    found: Sequence[tuple[str, Sequence[float | None], float]], num: int, over: str
) -> list[str]:
    """A table of estimates over so many problems or prompts, of which one has no interval."""
    lines = [f"| | value | 95 % interval over {over} |", "|---|---|---|"]
    for title, estimate, scale in found:
        value, low, high = (_number(end, scale) for end in estimate)
        interval = f"{low} to {high}" if num > 1 else "none"
        lines.append(f"| {title} | {value} | {interval} |")
    return lines


def _number(value: float | None, scale: float) -> str:
    return "unknown" if value is None else f"{scale * value:.4g}"


def _use(name: str) -> list[str]:
    quoted = json.dumps(one_line(name))
    text = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {quoted}
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)"""
    ends = "Its generation settings stop at every end token that it was trained with."
    return [*fenced("python", text), "", ends]
