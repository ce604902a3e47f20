"""The lines a user should see before the first step, what is noted of the run then, and warnings
after a step."""

import hashlib
from collections.abc import Callable
from typing import Any

from potstill.checks.exploration import Start, measure_start
from potstill.checks.finding import Subject
from potstill.checks.run import faults_at_start
from potstill.config import Recipe
from potstill.engines.mismatch import describe_mismatch
from potstill.models.adapters import describe_adapter, has_adapter
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel
from potstill.models.lean.quantized import describe_quantized, is_quantized
from potstill.models.weights import cautions
from potstill.objectives.habits import disagreement, what_is_unknown
from potstill.prompts.overview import first_prompt
from potstill.runs import run_folder
from potstill.runs.schema import MetricsRow, value_in
from potstill.tasks.own import describe_files
from potstill.teachers import vocabulary
from potstill.teachers.ends import describe_ends
from potstill.teachers.protocol import Teacher
from potstill.tracking.signs import SIGNS, Rows, Watch
from potstill.training.controllers import first_window
from potstill.training.rates import describe_lr, usual_lr, with_lr
from potstill.training.setup import Setup
from potstill.training.state import Trainer
from potstill.types import Prompt


def subject_of(recipe: Recipe, setup: Setup, world: World) -> Subject:
    """The parts of a run that is ready, as checks look at them."""
    of_student = (setup.student.num_weights, has_adapter(setup.student.model))
    lr = with_lr(recipe.train, *of_student).lr
    assert lr is not None, "with_lr sets one"
    return Subject(
        recipe=recipe,
        student=setup.student,
        teacher=setup.teacher,
        prompts=setup.prompts,
        ends=setup.ends,
        loss=setup.loss,
        lr=lr,
        usual_lr=usual_lr(*of_student),
        date=setup.date,
        device=world.device,
    )


def record_of(setup: Setup, world: World) -> dict[str, Any]:
    """The part of `environment.json` that is about the run: where it is, and what it is made of."""
    models: dict[str, Teacher] = {"student": setup.student}
    if setup.teacher is not None:
        models["teacher"] = setup.teacher
    models |= {f"teacher {each.name}": each.teacher for each in setup.teachings[1:]}
    identities: dict[str, dict[str, Any]] = {
        role: {
            "name": model.name,
            "weights": model.weights_digest(),
            "end_ids": list(model.end_ids),
        }
        for role, model in models.items()
    }
    writer = None if setup.cache is None else setup.cache.manifest.student
    if writer is not None:
        identities["writer"] = {"name": writer.name, "weights": writer.parameters}
    return {
        "world_size": world.size,
        "device": str(world.device),
        "compute_dtype": setup.loss.compute_dtype,
        "date": setup.date,
        "task_files": setup.task_files,
        "prompts": _digest_of_prompts(setup),
        "end_ids": list(setup.ends.stop_ids),
        "end_class": list(setup.ends.class_ids),
        "models": identities,
    }


def _digest_of_prompts(setup: Setup) -> str:
    """A checksum of all that a run reads of its prompts, of those that it measures on too, and of
    what a cache has of them."""
    # A file of the user's own may change what it scores by, which is noted.
    is_scored = setup.grader is not None and not setup.task_files
    shards = () if setup.cache is None else setup.cache.manifest.shards

    def read(p: Prompt) -> tuple[Any, ...]:
        cached = None if p.cached is None else (shards[p.cached[0]].sha256, p.cached[1])
        return (p.token_ids, p.completion_ids, p.trained, p.teacher_ids, cached)

    of_training = [
        (
            *read(p),
            p.example.source,
            [each.is_for(p) for each in setup.teachings],
            p.example.answer if is_scored else None,
        )
        for p in setup.prompts
    ]
    measured = [*setup.probes, *(() if setup.held_out is None else setup.held_out.prompts)]
    of_measures = [read(p) for p in measured]
    return hashlib.sha256(repr((of_training, of_measures)).encode()).hexdigest()[:16]


def opening(recipe: Recipe, setup: Setup, world: World, start: int) -> list[str]:
    """Everything a user should see before the first step, warnings included."""
    student, teacher = setup.student, setup.teacher
    lines = [f"{recipe.method}: {recipe.out}" + (f", resumed after step {start}" if start else "")]
    lines += describe_files(setup.task_files)
    lines += _about_teachers(setup) + _about_nothing(recipe, setup)
    lines += _about_ends(recipe, setup)
    lines += recipe.notes
    if has_adapter(student.model):
        lines.append(describe_adapter(student.model))
    lines += _about_quantized(setup)
    if recipe.train.compute_dtype is None and setup.loss.compute_dtype == "bfloat16":
        lines.append(
            "the student's passes compute in bfloat16, as its checkpoint is; its weights are in "
            f"{recipe.student.dtype} and the loss in float32 (train.compute_dtype chooses)"
        )
    if recipe.train.lr is None:
        lines.append(describe_lr(student.num_weights, has_adapter(student.model)))
    subject = subject_of(recipe, setup, world)
    lines += cautions(student.model, subject.lr, recipe.train.stochastic_rounding)
    lines += faults_at_start(subject)
    if setup.compared is not None and setup.loss.vocab_size is not None:
        lines += vocabulary.describe_cut(student, setup.compared, setup.loss.vocab_size)
    for name, flops in (("student", setup.student_flops), ("teacher", setup.teacher_flops)):
        if flops is not None and flops.per_pair is None:
            lines.append(
                f"warning: the {name}'s operations (flops) are counted without attention, whose "
                "sizes are unknown"
            )
    if recipe.rollouts.engine != "native":
        where = recipe.engine.url or f"{recipe.engine.python}, log in {recipe.out / 'engine'}"
        lines.append(f"engine: {recipe.rollouts.engine} ({where})")
    lines += _about_gates(recipe, setup)
    if setup.cache is not None:
        lines += setup.cache.describe()
    lines += setup.notes
    teacher_tokenizer = None if teacher is None else teacher.tokenizer
    return lines + first_prompt(
        setup.prompts, student.tokenizer, teacher_tokenizer, recipe.window.tokens
    )


def _about_gates(recipe: Recipe, setup: Setup) -> list[str]:
    """A line where the gates of engines are set and this device needs none."""
    given = sorted(recipe.engine.model_fields_set)
    writes_in = recipe.writes_in(setup.loss.compute_dtype)
    is_alike = writes_in == recipe.student.dtype and not recipe.has_older_prefixes
    if recipe.rollouts.engine != "native" or not is_alike or not given:
        return []
    return [
        f"not read on this device: {', '.join(f'engine.{name}' for name in given)}; the student "
        f"writes with its own weights, in {writes_in}"
    ]


def _about_quantized(setup: Setup) -> list[str]:
    """A line on each model that is quantised."""
    lines = []
    teachers = [("teacher", setup.teacher)]
    teachers += [(f"teacher {each.name!r}", each.teacher) for each in setup.teachings[1:]]
    for role, model in [("student", setup.student), *teachers]:
        if isinstance(model, LanguageModel) and is_quantized(model.model):
            dtype = str(model.head.weight_VD.dtype).removeprefix("torch.")
            lines.append(
                f"the {role}'s weights are quantised ({describe_quantized(model.model.config)}); "
                f"its others are in {dtype}, as in its files, and {role}.dtype is not read"
            )
    return lines


def _about_teachers(setup: Setup) -> list[str]:
    """A line on each of several teachers: its weight, and how many prompts it teaches."""
    lines = []
    for each in setup.teachings if len(setup.teachings) > 1 else ():
        num = sum(map(each.is_for, setup.prompts))
        lines.append(
            f"{each.name}: {each.teacher.name}, weight {each.weight:g}, teaches {num:,} of "
            f"{len(setup.prompts):,} prompts"
        )
    return lines


def _about_nothing(recipe: Recipe, setup: Setup) -> list[str]:
    """A warning where a teacher is the student, reads what it reads, and nothing else teaches."""
    is_alone = recipe.teacher.model == "self" and len(setup.teachings) == 1
    if not is_alone or recipe.is_scored or recipe.student.dropout:
        return []
    if any(prompt.teacher_ids is not None for prompt in setup.prompts):
        return []
    return [
        "warning: the teacher is the student and reads the same prompts, so that there is nothing "
        'to learn; teacher.prompt_template, as "{prompt} A solution: {solution}", or '
        "teacher.prompt_column gives it prompts that say more"
    ]


def _about_ends(recipe: Recipe, setup: Setup) -> list[str]:
    """Lines on what ends a completion and how the loss counts it; a warning where the two models
    end differently."""
    student, teacher, ends = setup.student, setup.teacher, setup.ends
    tokenizer = student.tokenizer
    lines = [f"end set: {describe_ends(tokenizer, ends.stop_ids)}"]
    if len(ends.all_ids) > 1 and recipe.objective.has_divergence:
        lines.append(
            "one class in the loss: "
            f"{describe_ends(tokenizer, ends.class_ids) or 'none, each end token is apart'}"
        )
    if teacher is None:
        return lines
    if setup.loss.translation is not None:
        theirs = describe_ends(teacher.tokenizer, setup.loss.translation.teacher.end_ids)
        far = vocabulary.describe_difference(tokenizer, teacher.tokenizer, ())
        return [*lines, f"the teacher's ends: {theirs}", f"the loss is of spans of text: {far}"]
    if unknown := what_is_unknown(recipe.objective, ends):
        lines.append(unknown)
    if set(student.end_ids) != set(teacher.end_ids):
        lines.append(
            f"warning: the student ends on {student.end_ids}, the teacher on {teacher.end_ids}"
        )
    if set(ends.stop_ids) != set(ends.all_ids):
        lines.append(
            'warning: rollouts.end_set is "student", so the end tokens that only the teacher has '
            "end nothing: expect responses that go on to the length cap"
        )
    return lines


def scores_at_start(recipe: Recipe, setup: Setup) -> Start | None:
    """Whether the student has anything to learn from its scores; measured once, so that a run that
    is resumed knows it."""
    if not recipe.reward.weight:
        return None
    path = recipe.out / "environment.json"
    begun = run_folder.read_json(path) if path.exists() else {}
    if "start" in begun:
        return begun["start"]
    assert setup.grader is not None, "a recipe with a reward is scored"
    return measure_start(
        recipe,
        setup.student,
        setup.prompts,
        setup.grader,
        max_tokens=first_window(recipe.window).tokens,
        end_ids=setup.ends.stop_ids,
        answer_end=setup.answer_end,
    )


def warner(trainer: Trainer, tell: Callable[..., None]) -> Callable[[MetricsRow], None]:
    """A function that is told of each step and warns of each sign once, also of a run that is
    resumed."""
    ends, tokenizer = trainer.setup.ends, trainer.setup.student.tokenizer

    def other_habits(first: Rows, recent: Rows) -> str | None:
        habits = recent[-1].get("end_habits")
        return None if habits is None else disagreement(habits, ends, tokenizer)

    computes_in = trainer.setup.loss.compute_dtype

    def off_engine(first: Rows, recent: Rows) -> str | None:
        mean = value_in(recent[-1], "engine_mismatch_mean_abs")
        largest = value_in(recent[-1], "engine_mismatch_max")
        if mean is None or largest is None:
            return None
        return describe_mismatch(trainer.recipe, computes_in, mean, largest)

    signs = SIGNS | {"ends": other_habits, "engine": off_engine}
    watch = Watch(signs, run_folder.read_metrics(trainer.folder))
    return lambda row: tell(*watch.after(row))
