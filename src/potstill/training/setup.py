"""A run made ready: models, prompts and loss, loaded and checked before anything is written."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.config import WITHOUT_TEACHER, Recipe, RecipeError, run_evaluation
from potstill.engines.protocol import Engine
from potstill.evaluation.quality import Scorer
from potstill.evaluation.scores import prepare_problems
from potstill.kl.fused import MIB
from potstill.kl.plan import find_backend
from potstill.models import distributed
from potstill.models.adapters import attach, name_of_base
from potstill.models.base_alone import as_it_is
from potstill.models.distributed import World
from potstill.models.flops import ModelFlops
from potstill.models.language_model import LanguageModel, load_config
from potstill.models.lean.activations import checkpointed_layers
from potstill.models.lean.compiling import refuse_compiling
from potstill.models.lean.optimizers import refuse_optimizer
from potstill.models.lean.packing import refuse_unpackable
from potstill.models.lean.quantized import refuse_to_train
from potstill.models.probe import ready
from potstill.models.templates import today
from potstill.objectives.loss import Loss
from potstill.objectives.trial import try_weighting
from potstill.planning.work import compute_dtype_on
from potstill.prompts.held_out import HeldOut, hold_out, task_of_data, validation_prompts
from potstill.prompts.mixture import Mixture, make_mixture
from potstill.prompts.prepare import prepare_prompts
from potstill.rollouts.prefixes import Writing
from potstill.rollouts.spans import Spelling, make_translation
from potstill.seeds import step_seed
from potstill.tasks import Task, is_table, make_task
from potstill.tasks.own import OwnJudge, own_files
from potstill.teachers import vocabulary
from potstill.teachers.cached import cached_once
from potstill.teachers.ends import Ends, answer_ends, find_ends
from potstill.teachers.load import load_further, load_teacher, refuse_untaught
from potstill.teachers.protocol import Teacher, Teaching
from potstill.teachers.remote.reach import fit_to_loss
from potstill.teachers.rope import refuse_crossing
from potstill.teachers.store import Cache
from potstill.types import DataError, Prompt, Writer


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything a run needs, loaded and checked before anything is written.

    `teachings` are the teachers whose divergence the loss has, `teacher` the first of them.
    `start` is the student before the first step, where the loss has a KL to it; `grader` gives the
    scores, where responses are scored. `longest` is the number of tokens of the longest prompt with
    its completion, of all that is written in the run.
    """

    student: LanguageModel
    teacher: Teacher | None
    teachings: tuple[Teaching, ...]
    cache: Cache | None
    prompts: list[Prompt]
    mixture: Mixture | None
    probes: list[Prompt]
    held_out: HeldOut | None
    ends: Ends
    loss: Loss
    start: LanguageModel | None
    longest: int
    grader: Scorer | None
    answer_end: Callable[[str], int | None]
    student_flops: ModelFlops
    teacher_flops: ModelFlops | None
    task_files: dict[str, str]
    date: str
    notes: tuple[str, ...]

    @property
    def compared(self) -> Teacher | None:
        """The teacher, if it can be compared with the student token by token."""
        return self.teacher if self.loss.translation is None else None


def writing_of(
    recipe: Recipe, setup: Setup, engines: Mapping[Writer, Engine], window: int
) -> Writing:
    """How the models of a run write completions of at most `window` tokens."""
    return Writing(
        objective=recipe.objective,
        engines=engines,
        window=window,
        end_ids=setup.ends.stop_ids,
        sampling=recipe.sampling,
        rollouts_per_step=recipe.rollouts_per_step,
        vocab_size=setup.loss.vocab_size,
        cache=setup.cache,
    )


def prepare(
    recipe: Recipe,
    world: World,
    *,
    student=None,
    teacher=None,
    tokenizer=None,
    prompts=None,
    date: str | None = None,
) -> Setup:
    """Load models and prompts and check that they fit together. Writes nothing.

    `date` is what chat templates are told; by default that of the cache, or today.
    """
    given, student = student, load_student(recipe, world, student, tokenizer)
    if recipe.train.activation_checkpointing:
        checkpointed_layers(student.model)
    if recipe.train.compile:
        refuse_compiling(student.model, world.device, world.size)
    cache = None if recipe.teacher.cache is None else Cache(Path(recipe.teacher.cache))
    teacher = load_teacher(recipe, student, cache, world, teacher, tokenizer)
    teachings = load_further(recipe, student, teacher, world)
    teachers = [each.teacher for each in teachings] or [teacher]
    if recipe.train.packing:
        refuse_unpackable(student, *teachers)
    vocab_size = vocabulary.shared_by_all(recipe, student, teachers, prompts)
    ends = find_ends(recipe, student, teacher, vocab_size)
    loss = _loss_of(recipe, vocab_size, ends, compute_dtype=compute_dtype_of(recipe, world, given))
    if recipe.objective.signal == "spans" and teacher is not None:
        own = _spelling(teacher)
        loss = dataclasses.replace(loss, translation=make_translation(_spelling(student), own))
        fit_to_loss(teacher, own.vocab_size, own.class_ids)
    else:
        fit_to_loss(teacher, vocab_size, ends.class_ids)
    _refuse_settings(recipe, loss, world)
    # The main rank's, as midnight may come between them.
    date = str(
        distributed.gather(date or (today() if cache is None else cache.manifest.date), world)[0]
    )
    divided = _divide_prompts(
        recipe, student, teacher, cache, ends=ends, loss=loss, given=prompts, date=date
    )
    refuse_untaught(divided.prompts, teachings, recipe.window.tokens)
    sources = recipe.data.sources if prompts is None else ()
    weights, names = [each.weight for each in sources], [each.source for each in sources]
    mixture = make_mixture(divided.prompts, weights, names)
    asked = [*divided.prompts, *divided.probes]
    asked += [] if divided.held_out is None else divided.held_out.prompts
    if recipe.evaluation.source is not None:
        # Its prompts are made again when the run ends; here a bad one is refused before any work is
        # done.
        asked += prepare_problems(student, run_evaluation(recipe), date)[2]
    has_task = prompts is None and not is_table(recipe.data.origin)
    task = _task_of(recipe) if has_task else None
    return Setup(
        student=student,
        teacher=teacher,
        teachings=teachings,
        cache=cache,
        prompts=divided.prompts,
        mixture=mixture,
        probes=divided.probes,
        held_out=divided.held_out,
        ends=ends,
        loss=loss,
        start=_start_of(recipe, student, world),
        longest=_longest(recipe, asked),
        grader=_grader_of(recipe, task),
        answer_end=(lambda text: None) if task is None else task.answer_end,
        student_flops=student.flops,
        teacher_flops=None if teacher is None else teacher.flops,
        task_files=own_files(recipe.data.origin if prompts is None else None, *recipe.own_sources),
        date=date,
        notes=divided.notes,
    )


def load_student(recipe: Recipe, world: World, given=None, tokenizer=None) -> LanguageModel:
    """The student of a recipe before its first step, with its adapter where it has one."""
    spec = recipe.student
    student = ready(
        spec.model if given is None else given,
        tokenizer,
        world.device,
        dtype=spec.dtype,
        init=spec.init,
        seed=recipe.train.seed,
        trust_remote_code=spec.trust_remote_code,
        attention=spec.attention,
    )
    refuse_to_train(student.name, student.model, recipe, world.size)
    if spec.lora.rank is not None:
        if spec.lora.save == "adapter":
            # Refused here where it cannot be named.
            name_of_base(student.model)
        attach(student.model, spec.lora, step_seed("adapter", recipe.train.seed))
    return student


def _start_of(recipe: Recipe, student: LanguageModel, world: World) -> LanguageModel | None:
    """The student as it is at first: its base where it has an adapter, else a copy; a resume puts
    the checkpoint's weights into the student alone."""
    if not recipe.reward.start_kl:
        return None
    return as_it_is(student, "start", world.size)


def _task_of(recipe: Recipe) -> Task:
    """The task of the data; where it scores responses, the one that has made the problems."""
    return task_of_data(recipe) if recipe.is_scored else make_task(str(recipe.data.origin))


def _grader_of(recipe: Recipe, task: Task | None) -> Scorer | None:
    """Whoever scores a step's responses. Raises DataError for prompts that nobody scores."""
    if not recipe.is_scored:
        return None
    if recipe.reward.source is not None:
        return OwnJudge(recipe.reward.source)
    if task is None:
        raise DataError(
            "the prompts are given and not of a task, so nothing scores their responses; name a "
            "function of yours in reward.source, or set reward.weight = 0"
        )
    return task


def _longest(recipe: Recipe, prompts: list[Prompt]) -> int:
    """The tokens of the longest prompt with the longest completion that may follow one."""
    caps = [recipe.window.tokens, recipe.validation.cap(recipe.window.tokens)]
    if recipe.evaluation.source is not None:
        caps.append(recipe.evaluation.max_tokens)
    lengths = [len(p.ids_of(who)) for p in prompts for who in ("student", "teacher")]
    return max(lengths) + max(caps)


def compute_dtype_of(recipe: Recipe, world: World, given: Any) -> str:
    """The autocast type of the student's passes: the recipe's, else its checkpoint's where the
    device is made for it. A student that is given as an object computes in float32."""
    on_cpu, spec = world.device.type == "cpu", recipe.student
    if recipe.train.compute_dtype is None and (on_cpu or given is not None):
        return "float32"
    return compute_dtype_on(recipe, load_config(spec.model, spec.trust_remote_code), on_cpu=on_cpu)


def _loss_of(recipe: Recipe, vocab_size: int | None, ends: Ends, *, compute_dtype: str) -> Loss:
    loss = Loss(
        objective=recipe.objective,
        reward=recipe.reward,
        normalize=recipe.train.normalize,
        compute_dtype=compute_dtype,
        vocab_size=vocab_size,
        end_class=ends.class_ids,
        budget=recipe.train.loss_memory * MIB,
        backend=recipe.train.loss_backend,
        importance_cap=recipe.engine.importance_cap,
    )
    try_weighting(loss, recipe.is_scored)
    return loss


def _spelling(model: LanguageModel | Teacher) -> Spelling:
    return Spelling(
        tokenizer=model.tokenizer,
        end_ids=answer_ends(model),
        vocab_size=vocabulary.num_named_rows(model),
        context_length=model.context_length,
    )


@dataclass(frozen=True, kw_only=True)
class _Divided:
    """The prompts of a run: to train on, for the length gate's probes, and of validation."""

    prompts: list[Prompt]
    probes: list[Prompt]
    held_out: HeldOut | None
    notes: tuple[str, ...]


def _divide_prompts(
    recipe: Recipe,
    student: LanguageModel,
    teacher: Teacher | None,
    cache: Cache | None,
    *,
    ends: Ends,
    loss: Loss,
    given,
    date: str,
) -> _Divided:
    """Tokenise and check the prompts, and say what each is for, with its place in the cache."""
    prompts, notes = prepare_prompts(
        recipe, student, teacher, end_ids=ends.stop_ids, date=date, given=given
    )
    _refuse_prompts(
        student, teacher, prompts, loss.vocab_size, window=("window.tokens", recipe.window.tokens)
    )
    prompts, probes = hold_out(recipe.window, prompts)
    models = {"student": student, "teacher": teacher}
    prompts, held_out, said = validation_prompts(
        recipe, prompts, **models, is_given=given is not None, date=date
    )
    if cache is not None:
        cache.check_fit(ends.stop_ids, loss.vocab_size, loss.end_class)
        prompts, probes = cache.attach(prompts), cache.attach(probes)
    if held_out is not None:
        held_out = _check_held_out(
            recipe, held_out, **models, cache=cache, vocab_size=loss.vocab_size
        )
    return _Divided(prompts=prompts, probes=probes, held_out=held_out, notes=(*notes, *said))


def _refuse_settings(recipe: Recipe, loss: Loss, world: World) -> None:
    """Raise for a loss backend or an optimiser that cannot run here, and for prompts that the ranks
    cannot share."""
    if loss.backend != "plain":
        try:
            find_backend(loss.backend, world.device)
        except ValueError as error:
            raise RecipeError(f"train.loss_backend is {loss.backend!r}: {error}") from None
    refuse_optimizer(recipe.train, world.size)
    per_step = recipe.train.prompts_per_step
    if per_step % world.size:
        raise DataError(
            f"train.prompts_per_step is {per_step}, which {world.size} ranks cannot share "
            f"evenly; use a multiple of {world.size}"
        )


def _refuse_prompts(
    student: LanguageModel,
    teacher: Teacher | None,
    prompts: list[Prompt],
    vocab_size: int | None,
    *,
    window: tuple[str, int],
) -> None:
    """Raise for ids that the two models do not share, and for texts that cross the border of a
    longrope model. `window` is the field of the longest completion, and its value."""
    field, max_tokens = window
    if vocab_size is not None:
        vocabulary.refuse_unshared_ids(prompts, vocab_size, student.tokenizer)
    refuse_crossing(student, [p.token_ids for p in prompts], max_tokens, field)
    if teacher is not None:
        refuse_crossing(teacher, [p.ids_of("teacher") for p in prompts], max_tokens, field)


def _check_held_out(
    recipe: Recipe,
    held_out: HeldOut,
    *,
    student: LanguageModel,
    teacher: Teacher | None,
    cache: Cache | None,
    vocab_size: int | None,
) -> HeldOut:
    """The prompts of validation, with what a cache has of them. Raises for what it does not have,
    and as training's."""
    goal = recipe.validation.keep_best
    if teacher is not None and not teacher.can_score:
        if cache is not None:
            held_out = dataclasses.replace(
                held_out, prompts=cached_once(recipe, cache, held_out.prompts)
            )
        if goal is not None and (goal.startswith("student_prefix") or goal == "teacher_log_prob"):
            raise RecipeError(
                f'validation.keep_best is "{goal}" and this teacher, such as a cache, cannot '
                'score what the student writes; use "teacher_prefix_forward_kl" or a live teacher'
            )
    elif teacher is not None and teacher.head is None and goal not in WITHOUT_TEACHER:
        raise RecipeError(
            f'validation.keep_best is "{goal}" and of a teacher with protocol = "logprobs" no '
            'whole distribution is known; use "score", "truncation" or "repetition"'
        )
    elif teacher is not None and teacher.decoder is None and str(goal).startswith("teacher_prefix"):
        raise RecipeError(
            f'validation.keep_best is "{goal}" and this teacher cannot write; use '
            '"student_prefix_forward_kl"'
        )
    elif teacher is None and goal not in WITHOUT_TEACHER:
        raise RecipeError(
            f'validation.keep_best is "{goal}", for which it takes a teacher, and this run has '
            'none; use "score", "truncation" or "repetition"'
        )
    if goal == "score" and held_out.task is None and recipe.reward.source is None:
        raise RecipeError(
            'validation.keep_best is "score" and the prompts are of no task, which alone can '
            'score; name a task in validation.source, or use "truncation" or "repetition"'
        )
    window = ("validation.max_tokens", recipe.validation.cap(recipe.window.tokens))
    _refuse_prompts(student, teacher, held_out.prompts, vocab_size, window=window)
    return held_out
