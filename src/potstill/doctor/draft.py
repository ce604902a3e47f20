"""First recipe for two models and some prompts: values that fit their sizes, and why.

Only configurations and tokenizers are read, so that it takes seconds for models of any size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from potstill.checks.settings import FEW_WEIGHTS
from potstill.config import METHODS, load_recipe, toml_value
from potstill.files import write_atomically
from potstill.models.language_model import LanguageModel, load_tokenizer
from potstill.planning.devices import free_memory
from potstill.planning.memory import MOMENTS
from potstill.planning.passes import activation_bytes
from potstill.planning.sizes import model_sizes, without_weights
from potstill.planning.units import shown_bytes
from potstill.prompts.examples import load_examples, make_prompts
from potstill.prompts.rows import Asked, make_examples
from potstill.tasks import is_table
from potstill.tasks.tables import DataRow, read_table_rows
from potstill.teachers.vocabulary import shared_vocab_size
from potstill.training.rates import usual_lr
from potstill.types import DataError, Example

Device = Literal["cpu", "gpu"]

# Columns that hold prompts, the first that is there before the others.
PROMPT_COLUMNS = ("prompt", "messages", "question", "problem", "instruction", "input", "text")
# Rows of a table, and problems of a task, that are read for their lengths.
NUM_READ = 1000
# By device: the usual window and prompts a step, and the most tokens of a batch.
USUAL_WINDOWS = {"cpu": 256, "gpu": 1024}
PROMPTS_PER_STEP = {"cpu": 8, "gpu": 32}
LEAST_BATCH, MOST_BATCH = 512, 16384
# A window that is worth training in, of which it is a multiple.
LEAST_WINDOW = 16
# One pass over the prompts, within these.
LEAST_STEPS, MOST_STEPS = 50, 500
# Peak learning rate of a toy, which learns hardly anything at the rates of real models.
TOY_LR = 1e-3
# Share of prompts that must leave room for a response; the longest others are left out.
KEPT = 0.95
# Share of free memory that a batch may take beside weights, gradients and moments.
BATCH_SHARE = 0.5
# Columns of the recipe before its comments.
COMMENT_COLUMN = 40


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The user's wishes, from which the rest follows. `column` holds the prompts of a table."""

    student: str
    teacher: str
    data: str
    method: str
    device: Device
    column: str | None = None


class Line(NamedTuple):
    """A dotted field of the recipe, its value, and why it is that."""

    name: str
    value: Any
    why: str


class Draft(NamedTuple):
    """A recipe in words, its lines, and what was found, for the user."""

    about: str
    lines: list[Line]
    said: list[str]


def outline(name: str) -> LanguageModel:
    """A model without its weights: sizes, tokenizer, context. Raises ModelError."""
    return without_weights(name, tokenizer=load_tokenizer(name))


def draft(wanted: Wanted, out: Path) -> Draft:
    """Choose what a recipe should say. Raises ModelError or DataError for what no run can use.

    `out` is the recipe's file, by which the run is named.
    """
    student, teacher = outline(wanted.student), outline(wanted.teacher)
    num_shared = shared_vocab_size(student, teacher)
    examples, column, has_more = _examples(wanted)
    template = _template(examples, student, teacher)
    prompts = make_prompts(
        examples, student.tokenizer, template=template, max_completion=0, context_length=None
    )
    lengths = sorted(len(prompt.token_ids) for prompt in prompts)
    context = min((m.context_length for m in (student, teacher) if m.context_length), default=None)
    window, longest = choose_window(lengths, context, USUAL_WINDOWS[wanted.device], wanted.data)
    about_prompts = (
        f"{'at least ' if has_more else ''}{len(prompts):,} prompts of {lengths[0]} to "
        f"{lengths[-1]} tokens"
    )
    why_teacher = f"{teacher.num_weights:,} weights; {num_shared:,} tokens in common"
    lines = [
        Line("out", f"runs/{out.stem}", "the run's folder"),
        Line("student.model", wanted.student, f"{student.num_weights:,} weights"),
        Line("teacher.model", wanted.teacher, why_teacher),
        Line("data.source", wanted.data, about_prompts),
    ]
    if column is not None:
        lines.append(Line("data.prompt_column", column, "the column of the prompts"))
    if template is not None:
        lines.append(Line("data.template", template, "both models have a template for chats"))
    if longest < lengths[-1]:
        why = f"prompts of more than {longest} tokens; refuse and cut-left are the other ways"
        lines.append(Line("data.too_long", "drop", why))
    lines += _about_training(wanted, student, num_prompts=len(prompts), window=window)
    lines += _about_size(wanted, student, teacher, longest=longest + window)
    if not is_table(wanted.data):
        lines.append(Line("evaluation.source", wanted.data, "its held-out problems, at the end"))
        lines.append(Line("evaluation.max_tokens", window, "as in training"))
    said = [
        f"student {wanted.student}: {student.num_weights:,} weights",
        f"teacher {wanted.teacher}: {why_teacher}",
        f"data {wanted.data}: {about_prompts}"
        + ("" if column is None else f", in the column {column!r}"),
    ]
    about = f"{METHODS[wanted.method].name} of {wanted.teacher} into {wanted.student}"
    return Draft(f"{about}, written by `potstill init`.", lines, said)


def _about_training(
    wanted: Wanted, student: LanguageModel, *, num_prompts: int, window: int
) -> list[Line]:
    method = METHODS[wanted.method]
    per_step = min(PROMPTS_PER_STEP[wanted.device], num_prompts)
    num_steps = max(min(num_prompts // per_step, MOST_STEPS), LEAST_STEPS)
    passes = num_steps * per_step / num_prompts
    return [
        Line("objective.prefix", method.prefix, f"who writes; with kl below this is {method.name}"),
        Line("objective.kl", method.kl, "forward keeps variety, reverse sharpens"),
        Line("window.tokens", window, "longest response; no later end is learnt"),
        Line("train.steps", num_steps, f"each prompt about {max(passes, 0.01):.2g} times"),
        Line("train.prompts_per_step", per_step, "fewer are faster and noisier"),
        _lr(student.num_weights),
    ]


def _lr(num_weights: int) -> Line:
    if num_weights < FEW_WEIGHTS:
        return Line("train.lr", TOY_LR, "for so few weights; real models need far less")
    return Line("train.lr", usual_lr(num_weights), "usual for this size; fresh students need more")


def _examples(wanted: Wanted) -> tuple[list[Example], str | None, bool]:
    """The first examples, the column of their prompts where the recipe must name it, and whether
    there may be more."""
    if not is_table(wanted.data):
        return load_examples(wanted.data), None, False
    first = read_table_rows(wanted.data, [], num_rows=1)
    if not first:
        raise DataError(f"{wanted.data!r} has no rows; give a data source with prompts")
    asked = Asked(column=wanted.column or _column(first[0], wanted.data))
    rows = read_table_rows(wanted.data, asked.columns(), num_rows=NUM_READ)
    column = None if asked.column == "prompt" else asked.column
    return make_examples(rows, asked), column, len(rows) == NUM_READ


def _column(row: DataRow, source: str) -> str:
    """The column that most likely holds the prompts. Raises DataError where none does."""
    found = next((name for name in PROMPT_COLUMNS if name in row.names), None)
    if found is None and len(row.names) == 1:
        found = row.names[0]
    if found is None:
        raise DataError(
            f"{source!r} has the columns {', '.join(row.names)}, and none is called "
            f"{', '.join(PROMPT_COLUMNS[:4])} or the like; name it with --column"
        )
    # Chats are read where no column is named, whether they wait for an answer or have one.
    return "prompt" if found == "messages" else found


def _template(
    examples: Sequence[Example], student: LanguageModel, teacher: LanguageModel
) -> Literal["chat"] | None:
    """How plain texts are asked: as a chat where both models know one."""
    has_texts = any(isinstance(example.prompt, str) for example in examples)
    both = student.tokenizer.chat_template and teacher.tokenizer.chat_template
    return "chat" if has_texts and both else None


def choose_window(
    lengths: Sequence[int], context: int | None, usual: int, source: str
) -> tuple[int, int]:
    """The window, and the longest prompt that leaves room for it, from the prompts' sorted lengths.

    Raises DataError where hardly any prompt leaves room.
    """
    for longest in (lengths[-1], lengths[int(KEPT * (len(lengths) - 1))]):
        window = usual if context is None else min(usual, context - longest)
        if window >= LEAST_WINDOW:
            return window // LEAST_WINDOW * LEAST_WINDOW, longest
    raise DataError(
        f"{source!r} has prompts of up to {lengths[-1]} tokens, and the models' context is "
        f"{context}: there is no room for a response; give shorter prompts or other models"
    )


def _about_size(
    wanted: Wanted, student: LanguageModel, teacher: LanguageModel, *, longest: int
) -> list[Line]:
    """Lines that follow from the device: tokens of a batch, by its free memory, and types."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if wanted.device == "gpu" and has_gpu else "cpu")
    is_here = has_gpu or wanted.device == "cpu"
    free = free_memory(device) if is_here else None
    a_token = activation_bytes(model_sizes(student), 1, is_half=wanted.device == "gpu")
    # Weights, gradients and moments, in float32.
    fixed = 4 * ((2 + MOMENTS) * student.num_weights + teacher.num_weights)
    left = MOST_BATCH * a_token if free is None else (free - fixed) * BATCH_SHARE
    most = min(max(int(left / a_token), LEAST_BATCH, longest), MOST_BATCH)
    size = 2 ** (most.bit_length() - 1)
    have = "" if free is None else f", of {shown_bytes(free)} that are free"
    why = f"about {shown_bytes(fixed + size * a_token)} of memory with both models{have}"
    lines = [Line("train.tokens_per_batch", size, why)]
    if wanted.device == "gpu":
        why = "of the student's passes; its weights and the loss stay in float32"
        lines.append(Line("train.compute_dtype", "bfloat16", why))
    return lines


def as_toml(draft: Draft) -> str:
    """The recipe as text, with why each value is what it is."""
    texts = [f"{x.name.rpartition('.')[2]} = {toml_value(x.value)}" for x in draft.lines]
    width = min(max(map(len, texts)), COMMENT_COLUMN)
    rows, section = [f"# {draft.about}"], ""
    for line, text in zip(draft.lines, texts, strict=True):
        mine = line.name.rpartition(".")[0]
        if mine != section:
            rows += ["", f"[{mine}]"]
            section = mine
        rows.append(f"{text:{width}}  # {line.why}")
    return "\n".join(rows) + "\n"


def write_draft(draft: Draft, out: Path) -> None:
    """Write the recipe, and read it again as a run will."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, as_toml(draft))
    load_recipe(out)
