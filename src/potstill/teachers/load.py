"""The teachers of a run, wherever their models are."""

import copy
from collections.abc import Sequence

from potstill.config import FurtherTeacher, Recipe, TeacherModel, TeacherSpec
from potstill.models.base_alone import BaseAlone, as_it_is
from potstill.models.distributed import World
from potstill.models.given import share_weights
from potstill.models.language_model import LanguageModel, load_config
from potstill.models.lean.quantized import describe_quantized, is_quantized, is_quantized_by
from potstill.models.probe import ready
from potstill.teachers.cached import CachedTeacher
from potstill.teachers.placed import loading_device, placed
from potstill.teachers.protocol import Teacher, Teaching
from potstill.teachers.remote.reach import reach
from potstill.teachers.rope import refuse_crossing
from potstill.teachers.sharded import load_sharded
from potstill.teachers.store import Cache
from potstill.types import DataError, ModelError, Prompt


def load_teacher(
    recipe: Recipe,
    student: LanguageModel,
    cache: Cache | None,
    world: World,
    given=None,
    tokenizer=None,
) -> Teacher | None:
    """The teacher of a run: `given`, loaded, the student as it is, or what a cache holds of one;
    None without need.

    Raises CacheError for a cache of another teacher, or one that was written in another way.
    """
    objective, spec = recipe.objective, recipe.teacher
    if not objective.has_teacher:
        return None
    is_student = given is not None and given in (student, student.model)
    if given is not None:
        _refuse_place_of_given(spec, is_student, world)
    if is_student:
        # One object cannot both change and stay as it is.
        teacher = as_it_is(student, student.name, world.size)
    else:
        teacher = (
            None
            if given is None
            else ready(given, tokenizer, loading_device(spec, world), attention=spec.attention)
        )
    if cache is not None and (
        cache.manifest.settings.payload != "completions" or objective.signal == "labels"
    ):
        cache.check_recipe(recipe, teacher)
        return CachedTeacher(cache, world.device, spec.trust_remote_code)
    if teacher is None and spec.model == "self":
        teacher = _own_teacher(spec, student, world)
    elif teacher is None and spec.url is not None:
        must_write = objective.prefix in ("teacher", "mixed") and cache is None
        top_k = objective.top_k if objective.signal == "topk" else 0
        return reach(spec, world.device, must_write, top_k)
    elif teacher is None and spec.placement == "sharded" and world.size > 1:
        _refuse_quantized(spec)
        return load_sharded(spec, world)
    elif teacher is None:
        teacher = _loaded(spec, world)
    if cache is not None:
        cache.check_recipe(recipe, teacher)
    if isinstance(teacher, BaseAlone):
        return teacher
    if share_weights(teacher, student):
        teacher = teacher.around(copy.deepcopy(teacher.model), teacher.name)
    return placed(teacher.eval().requires_grad_(False), spec, world)


def _refuse_place_of_given(spec: TeacherModel, is_student: bool, world: World) -> None:
    """Raise ModelError for a teacher that is given as an object and would have to be elsewhere."""
    if spec.placement == "sharded" and world.size > 1:
        raise ModelError(
            "the teacher is given as an object, whole on each rank, and teacher.placement is "
            '"sharded", which deals out a model from its files; name it by teacher.model'
        )
    if is_student and (spec.placement == "offloaded" or spec.device is not None):
        raise ModelError(
            "the teacher that is given is the student, which is where it learns; leave "
            "teacher.placement and teacher.device out, or give a model of its own"
        )


def _refuse_quantized(spec: TeacherModel) -> None:
    """Raise ModelError for a quantised teacher that would have to be taken apart."""
    config = load_config(spec.model, spec.trust_remote_code)
    if is_quantized_by(config):
        raise ModelError(
            f"teacher {spec.model!r} is quantised ({describe_quantized(config)}) and "
            f'teacher.placement is "{spec.placement}", which takes whole weights; leave it out'
        )


def load_further(
    recipe: Recipe, student: LanguageModel, first: Teacher | None, world: World
) -> tuple[Teaching, ...]:
    """All teachers of a recipe, the first one first; none where it has no divergence.

    Raises ModelError for one whose end tokens the first one and the student do not know.
    """
    if first is None or not recipe.objective.has_divergence:
        return ()
    spec = recipe.teacher
    found = [_teaching("teacher", first, spec)]
    known = {*student.end_ids, *first.end_ids}
    for each in recipe.teachers:
        teacher = _further(each, student, world)
        if others := sorted(set(teacher.end_ids) - known):
            raise ModelError(
                f"teacher {each.name!r} ends on {others}, which neither the student nor the first "
                "teacher does; give its generation_config.json their eos_token_id"
            )
        found.append(_teaching(each.name, teacher, each))
    return tuple(found)


def _teaching(name: str, teacher: Teacher, spec: TeacherModel) -> Teaching:
    return Teaching(
        name=name, teacher=teacher, flops=teacher.flops, weight=spec.weight, only=spec.only
    )


def _further(spec: FurtherTeacher, student: LanguageModel, world: World) -> Teacher:
    if spec.model == "start":
        return as_it_is(student, "start", world.size)
    if spec.url is not None:
        return reach(spec, world.device)
    return placed(_loaded(spec, world).eval().requires_grad_(False), spec, world)


def _loaded(spec: TeacherModel, world: World) -> LanguageModel:
    if spec.placement != "replicated":
        _refuse_quantized(spec)
    return ready(
        spec.model,
        device=loading_device(spec, world),
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
        attention=spec.attention,
    )


def _own_teacher(spec: TeacherSpec, student: LanguageModel, world: World) -> LanguageModel:
    """The student as it is now, or a copy that is to follow it. Raises ModelError."""
    # On a resume the student's weights come from the checkpoint, and these stay what they were.
    if spec.follows_every is None:
        return as_it_is(student, "self", world.size)
    if spec.ema is not None and is_quantized(student.model):
        raise ModelError(
            f"teacher.ema is {spec.ema:g} and student {student.name!r} is quantised, whose codes "
            "have no average in float32; set teacher.refresh_steps in its place"
        )
    copied = copy.deepcopy(student.model)
    # A moving average takes smaller steps than bfloat16 has.
    return student.around(copied if spec.ema is None else copied.float(), "self")


def refuse_untaught(
    prompts: Sequence[Prompt], teachings: Sequence[Teaching], max_tokens: int
) -> None:
    """Raise for a prompt whose completion of at most `max_tokens` tokens no teacher would teach,
    or which is too long for one beside the first, by whose context prompts are made; and for a
    teacher of no prompt."""
    for each in teachings[1:]:
        read = [prompt for prompt in prompts if each.is_for(prompt)]
        refuse_crossing(each.teacher, [p.token_ids for p in read], max_tokens, "window.tokens")
        longest = max(read, key=lambda prompt: len(prompt.token_ids), default=None)
        limit = each.teacher.context_length
        if longest is not None and limit and len(longest.token_ids) + max_tokens > limit:
            raise DataError(
                f"{longest.example.name} has {len(longest.token_ids)} tokens, which with "
                f"{max_tokens} for the completion is more than the context of teacher "
                f"{each.name!r}, {limit}; shorten the prompt or lower window.tokens"
            )
    for prompt in prompts if teachings else ():
        if not any(each.is_for(prompt) for each in teachings):
            named = "; ".join(f"{each.name}: {', '.join(each.only or ())}" for each in teachings)
            level = prompt.example.level
            has = f"has the level {level!r}" if level else "has no level (data.level_column)"
            raise DataError(
                f"{prompt.example.name} {has}, and `only` of no teacher names it ({named}); add it "
                "to one, or leave the prompt out"
            )
    for each in teachings:
        if not any(each.is_for(prompt) for prompt in prompts):
            levels = sorted({prompt.example.level for prompt in prompts})
            raise DataError(
                f"the teacher {each.name!r} teaches no prompt: its `only` names "
                f"{', '.join(each.only or ())}, and the levels of the prompts are "
                f"{', '.join(map(repr, levels[:8]))}{' ...' * (len(levels) > 8)}; mend it, or "
                "remove the teacher"
            )
