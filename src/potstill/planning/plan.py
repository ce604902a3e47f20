"""Plan of a recipe on some devices, for itself and for the other cells of its grid."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from potstill.config import METHODS, CacheOptions, Lora, Recipe, TeacherModel
from potstill.planning.devices import DeviceSpec
from potstill.planning.disk import Disk, bytes_a_token, disk_of
from potstill.planning.memory import Memory, Outlines, TeacherPlace, memory_of
from potstill.planning.operations import operations_of
from potstill.planning.seconds import Traffic, seconds_of, traffic_of
from potstill.planning.sizes import Outline, outline_of, planned_student, without_weights
from potstill.planning.work import Work, compute_dtype_on, with_field, work_of

# The share of a peak that a change must take away to be worth a line.
LEAST_HELP = 0.01


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """The circumstances of a plan: a device, how many of them, and tokens of a prompt and of a
    response, of which no configuration tells."""

    device: DeviceSpec
    num_devices: int = 1
    prompt_tokens: int = 128
    response_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Needs of a step on one device; operations and seconds by part."""

    place: TeacherPlace
    work: Work
    memory: Memory
    operations: dict[str, float]
    seconds: dict[str, float]
    traffic: Traffic

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    def fits(self, device: DeviceSpec) -> bool:
        return self.memory.peak <= device.memory


@dataclass(frozen=True, kw_only=True)
class Change:
    """A field of the recipe that makes a plan smaller, its value, and the peak with it."""

    field: str
    value: Any
    peak: int


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """Corners of the grid that cost the same, and where their teacher's signal comes from."""

    methods: str
    prefix: str
    needs: Needs


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    recipe: Recipe
    asked: Circumstances
    pair: Outlines
    needs: Needs
    disk: Disk
    cache_token: int | None
    cells: list[PlannedCell]
    changes: list[Change]


def make_plan_of(recipe: Recipe, asked: Circumstances) -> RunPlan:
    """Plan a recipe from configurations alone. Raises ModelError or DataError."""
    pair = pair_of(recipe)
    needs = needs_of(recipe, pair, place_of(recipe), asked)
    token = None
    if pair.teacher is not None:
        token = bytes_a_token(CacheOptions(), pair.teacher.sizes, recipe.objective.top_k)
    fits = needs.fits(asked.device)
    return RunPlan(
        recipe=recipe,
        asked=asked,
        pair=pair,
        needs=needs,
        disk=disk_of(recipe, pair.student.sizes),
        cache_token=token,
        cells=cells_of(recipe, pair, asked),
        changes=[] if fits else changes_that_help(recipe, pair, asked),
    )


def pair_of(recipe: Recipe) -> Outlines:
    """The outlines of a recipe's models, from their configurations. Raises ModelError."""
    spec = recipe.student
    student = planned_student(spec.model, spec.lora, spec.trust_remote_code)
    if not recipe.objective.has_teacher:
        return Outlines(student=student, teacher=None)

    def outline(teacher: TeacherModel) -> Outline:
        if teacher.model in ("self", "start"):
            return planned_student(spec.model, Lora(), spec.trust_remote_code)
        return outline_of(without_weights(teacher.model, teacher.trust_remote_code))

    further = tuple(outline(each) for each in recipe.teachers)
    return Outlines(student=student, teacher=outline(recipe.teacher), further=further)


def place_of(recipe: Recipe) -> TeacherPlace:
    """Where the recipe's own teacher is."""
    if not recipe.objective.has_teacher:
        return "none"
    if recipe.teacher.url is not None:
        return "remote"
    return "live" if recipe.teacher.cache is None else "cached"


def needs_of(recipe: Recipe, pair: Outlines, place: TeacherPlace, asked: Circumstances) -> Needs:
    """Count what a step takes: memory with responses as long as the window, the rest with those
    that are expected."""
    num_devices, device = asked.num_devices, asked.device
    longest = work_of(recipe, asked.prompt_tokens, recipe.window.tokens, num_devices)
    num_tokens = asked.response_tokens or recipe.window.tokens
    work = work_of(recipe, asked.prompt_tokens, num_tokens, num_devices)
    operations = operations_of(recipe, pair, work, place)
    return Needs(
        place=place,
        work=work,
        memory=memory_of(
            recipe, pair, longest, place, num_devices=num_devices, on_cpu=device.is_cpu
        ),
        operations=operations,
        seconds=seconds_of(
            recipe,
            pair,
            work,
            place,
            device=device,
            num_devices=num_devices,
            operations=operations,
        ),
        traffic=traffic_of(recipe, pair, work, place, num_devices, on_cpu=device.is_cpu),
    )


def cells_of(recipe: Recipe, pair: Outlines, asked: Circumstances) -> list[PlannedCell]:
    """The corners of the grid with each place of a teacher that they can have: a cache does not
    know what a student will write, and has no room for several teachers; a student that is its own
    is here. The direction of the KL costs nothing."""
    if pair.teacher is None:
        return []
    elsewhere: tuple[TeacherPlace, ...] = ("remote",) if recipe.teacher.model != "self" else ()
    stored: tuple[TeacherPlace, ...] = ("cached",) if elsewhere and not recipe.teachers else ()
    places: dict[str, tuple[TeacherPlace, ...]] = {
        "teacher": ("live", *stored, *elsewhere),
        "student": ("live", *elsewhere),
    }
    cells = []
    for prefix, of_prefix in places.items():
        names = [name for name, method in METHODS.items() if method.prefix == prefix]
        other = with_field(recipe, "objective.prefix", prefix)
        if prefix == "teacher":
            # A teacher that is spread does not write.
            other = with_field(other, "teacher.placement", "replicated")
        cells += [
            PlannedCell(
                methods=", ".join(names), prefix=prefix, needs=needs_of(other, pair, place, asked)
            )
            for place in of_prefix
        ]
    return cells


def changes_that_help(recipe: Recipe, pair: Outlines, asked: Circumstances) -> list[Change]:
    """Changes of fields, one after the other, until the plan fits or none is left: first those that
    change results by rounding alone."""
    changes: list[Change] = []
    place, needs = place_of(recipe), needs_of(recipe, pair, place_of(recipe), asked)
    while not needs.fits(asked.device):
        found = _next_change(recipe, pair, place, asked, needs)
        if found is None:
            return changes
        (field, value), recipe, place, needs = found
        changes.append(Change(field=field, value=value, peak=needs.memory.peak))
    return changes


def _next_change(
    recipe: Recipe, pair: Outlines, place: TeacherPlace, asked: Circumstances, needs: Needs
) -> tuple[tuple[str, Any], Recipe, TeacherPlace, Needs] | None:
    """The first change that makes the peak smaller, and what follows from it."""
    candidates = _smaller_fields(recipe, pair, place, asked)
    for field, value in candidates:
        other = place
        if field == "teacher.cache":
            changed, other = recipe, "cached"
        else:
            changed = with_field(recipe, field, value)
        smaller = needs_of(changed, pair, other, asked)
        if smaller.memory.peak < (1 - LEAST_HELP) * needs.memory.peak:
            return (field, value), changed, other, smaller
    return None


def _smaller_fields(
    recipe: Recipe, pair: Outlines, place: TeacherPlace, asked: Circumstances
) -> list[tuple[str, Any]]:
    """Fields with values that may take less memory, those first that change results by rounding
    alone."""
    work = work_of(recipe, asked.prompt_tokens, recipe.window.tokens, asked.num_devices)
    train, candidates = recipe.train, list[tuple[str, Any]]()
    if work.rows > 1:
        candidates.append(("train.tokens_per_batch", work.rows // 2 * work.positions))
    if recipe.sampling.batch_size > 1:
        candidates.append(("sampling.batch_size", recipe.sampling.batch_size // 2))
    if train.loss_memory:
        candidates.append(("train.loss_memory", train.loss_memory // 2))
    if not train.activation_checkpointing:
        candidates.append(("train.activation_checkpointing", True))
    if recipe.teacher.dtype == "float32" and recipe.teacher.model != "self":
        candidates.append(("teacher.dtype", "bfloat16"))
    dtype = compute_dtype_on(recipe, pair.student.config, on_cpu=asked.device.is_cpu)
    if (dtype, recipe.student.dtype) == ("float32", "float32"):
        candidates.append(("train.compute_dtype", "bfloat16"))
    if asked.num_devices == 1 and not train.needs_torchao:
        candidates.append(("train.optimizer", "adamw-8bit"))
    is_placed = recipe.teacher.placement != "replicated" or recipe.teacher.device is not None
    writes = recipe.objective.prefix in ("teacher", "mixed")
    if place == "live" and not (is_placed or writes or recipe.teacher.model == "self"):
        if asked.num_devices > 1:
            candidates.append(("teacher.placement", "sharded"))
        elif not asked.device.is_cpu:
            candidates.append(("teacher.placement", "offloaded"))
    if place == "live" and recipe.objective.prefix in ("teacher", "dataset"):
        candidates.append(("teacher.cache", "FOLDER"))
    return candidates


def as_data(plan: RunPlan) -> dict[str, Any]:
    """Plain data, whose keys stay the same from version to version."""
    models = {"student": plan.pair.student, "teacher": plan.pair.teacher}
    return {
        "method": plan.recipe.method,
        "device": {"name": plan.asked.device.name, "memory": plan.asked.device.memory},
        "num_devices": plan.asked.num_devices,
        "prompt_tokens": plan.asked.prompt_tokens,
        "response_tokens": plan.needs.work.completion_tokens,
        "models": {
            role: {"name": model.name, "num_weights": model.sizes.num_weights}
            for role, model in models.items()
            if model is not None
        },
        "fits": plan.needs.fits(plan.asked.device),
        **_needs_data(plan.needs),
        "disk": dataclasses.asdict(plan.disk) | {"most": plan.disk.most},
        "cache_bytes_a_token": plan.cache_token,
        "cells": [{"methods": cell.methods, **_needs_data(cell.needs)} for cell in plan.cells],
        "changes": [dataclasses.asdict(change) for change in plan.changes],
    }


def _needs_data(needs: Needs) -> dict[str, Any]:
    memory = needs.memory
    return {
        "teacher": needs.place,
        "memory": {
            "peak": memory.peak,
            "fullest": memory.fullest,
            "kept": memory.kept,
            "phases": memory.phases,
            "is_counted": memory.is_counted,
        },
        "operations": needs.operations,
        "seconds": needs.seconds | {"step": needs.step_seconds},
        "traffic": dataclasses.asdict(needs.traffic),
    }
