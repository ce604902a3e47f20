"""Seconds of a step on a device, by part, and the bytes that devices send each other.

A model, not a measurement, and below what a step takes (docs/performance.md). Products take their
operations over a share of the device's peak in their type, and a pass at least the time to start
the operations of each layer. Decoding takes, for each token, the longest of its products, of
reading the weights and the cache, and of starting. The optimiser and what is sent take their bytes
over a share of the bandwidth, and nothing overlaps.
"""

from dataclasses import dataclass

from potstill.config import Recipe
from potstill.planning.devices import DEVICES_PER_MACHINE, EFFICIENCY, DeviceSpec
from potstill.planning.memory import (
    Outlines,
    TeacherPlace,
    drawing_bytes,
    is_spread,
    teacher_dtype,
    writes_in,
)
from potstill.planning.operations import teacher_elsewhere
from potstill.planning.sizes import BYTES, Outline, Sizes
from potstill.planning.work import Work, compute_dtype_on

# Numbers that an update reads and writes for a weight: it reads weight, gradient and both moments,
# and writes all but the gradient.
UPDATE_TOUCHES = 4 + 3
# Bytes a second from a machine's memory to a GPU: four fifths of 16 lanes of PCI Express 4.
HOST_LINK = 25e9


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a device receives in a step: the student's layers and gradients (`shards`), the
    whole weights that decode, here or in an engine (`copy`), a spread teacher's layers (`teacher`),
    and a remote one's states (`states`).

    `push` is what an engine that decodes would get instead of `copy`, in bfloat16.
    """

    shards: float
    copy: float
    teacher: float
    states: float
    push: float

    @property
    def total(self) -> float:
        return self.shards + self.copy + self.teacher + self.states


def traffic_of(
    recipe: Recipe,
    pair: Outlines,
    work: Work,
    place: TeacherPlace,
    num_devices: int,
    *,
    on_cpu: bool = False,
) -> Traffic:
    """The traffic of FSDP2 as `distributed.shard` sets it up: layers are gathered for each batch's
    forward and backward pass, what is outside of them once, and gradients are scattered."""
    student, dtype = pair.student.sizes, recipe.student.dtype
    others, reuse = (num_devices - 1) / num_devices, recipe.rollouts.reuse
    outside = student.outside_layers * BYTES[dtype]
    gathered = 2 * (student.weight_bytes(dtype) - outside) + outside
    of_teacher = states = 0.0
    if is_spread(recipe, place, num_devices) and pair.teacher is not None:
        teacher = pair.teacher.sizes
        in_layers = teacher.num_weights - teacher.outside_layers
        of_teacher = others * work.num_batches * in_layers * BYTES[teacher_dtype(recipe)]
    num_tokens = work.num_rollouts * work.completion_tokens
    writing = student.trained_bytes(writes_in(recipe, pair, on_cpu=on_cpu))
    if place == "remote" and pair.teacher is not None:
        states = num_tokens * pair.teacher.sizes.width * BYTES[recipe.teacher.wire_dtype]
    for spec, outline in zip(recipe.teachers, pair.further, strict=True):
        if spec.url is not None:
            states += num_tokens * outline.sizes.width * BYTES[spec.wire_dtype]
    return Traffic(
        shards=others * work.num_batches * (gathered + student.trained_bytes(dtype)),
        copy=others * writing / reuse if recipe.student_writes else 0.0,
        teacher=of_teacher,
        states=states,
        push=student.num_weights * BYTES["bfloat16"] / reuse,
    )


def seconds_of(
    recipe: Recipe,
    pair: Outlines,
    work: Work,
    place: TeacherPlace,
    *,
    device: DeviceSpec,
    num_devices: int,
    operations: dict[str, float],
) -> dict[str, float]:
    """Seconds of a step by part. A remote teacher has as many devices of its own, of the same
    kind, and is waited for."""
    computing = compute_dtype_on(recipe, pair.student.config, on_cpu=device.is_cpu)
    is_half = "bfloat16" in (recipe.student.dtype, computing)
    trained, scoring = "bfloat16" if is_half else "float32", teacher_dtype(recipe)
    student = pair.student.sizes
    elsewhere = teacher_elsewhere(recipe, pair, work, place)
    traffic = traffic_of(recipe, pair, work, place, num_devices, on_cpu=device.is_cpu)
    share = {name: 1.0 if device.is_measured else value for name, value in EFFICIENCY.items()}
    touched = UPDATE_TOUCHES * student.trained_bytes(recipe.student.dtype) / num_devices
    of_student, of_teacher = _heads(recipe, pair, operations)
    sending = device.near if num_devices <= DEVICES_PER_MACHINE else device.far
    starting = work.num_batches * device.a_layer
    forward, backward = operations["student_forward"], operations["student_backward"]
    backward += operations["layers_again"]
    return {
        "rollouts": _writing_seconds(recipe, pair, work, place, device),
        "teacher": max(
            (operations["teacher"] + elsewhere) / _products(device, scoring),
            _seconds_to_bring(recipe, pair, work, place),
            0.0 if place in ("cached", "none") else starting * _layers(pair.teacher),
        ),
        "student forward": max(forward / _products(device, trained), starting * student.num_layers),
        "student backward": max(
            backward / _products(device, trained), 2 * starting * student.num_layers
        ),
        "heads": of_student / _products(device, recipe.student.dtype)
        + of_teacher / _products(device, scoring),
        "optimiser": touched / (device.reading * share["reading"]),
        "sending": traffic.total / (sending * share["sending"]),
    }


def _seconds_to_bring(recipe: Recipe, pair: Outlines, work: Work, place: TeacherPlace) -> float:
    """Seconds to bring an offloaded teacher's weights to the device, for each batch."""
    if pair.teacher is None or place != "live" or recipe.teacher.placement != "offloaded":
        return 0.0
    return work.num_batches * pair.teacher.sizes.weight_bytes(teacher_dtype(recipe)) / HOST_LINK


def _layers(model: Outline | None) -> int:
    return 0 if model is None else model.sizes.num_layers


def _heads(recipe: Recipe, pair: Outlines, operations: dict[str, float]) -> tuple[float, float]:
    """The operations of the student's head and of the teacher's. Products with a float32 head are
    in float32, and what is done twice is shared out as the rest."""
    flops = pair.student.sizes.flops
    student = 3 * flops.head - flops.frozen_head
    teacher = 0
    if pair.teacher is not None and recipe.objective.has_divergence:
        teacher = pair.teacher.sizes.flops.head
    total = operations["head"] + operations["again"]
    share = student / (student + teacher)
    return share * total, (1 - share) * total


def _products(device: DeviceSpec, dtype: str) -> float:
    """Operations a second that are reckoned with."""
    peak = device.half if dtype == "bfloat16" else device.single
    return peak if device.is_measured else peak * EFFICIENCY["products"]


def _writing_seconds(
    recipe: Recipe, pair: Outlines, work: Work, place: TeacherPlace, device: DeviceSpec
) -> float:
    """Seconds of the rollouts of one device, of all models that write."""
    objective = recipe.objective
    student_share = {"student": 1.0, "mixed": objective.student_share}.get(objective.prefix, 0.0)
    teacher_share = {"teacher": 1.0, "mixed": 1 - objective.student_share}.get(
        objective.prefix, 0.0
    )
    if objective.prefix == "mixed" and objective.prefix_mix == "token":
        student_share = teacher_share = 1.0
    total = 0.0
    if student_share and place != "cached":
        dtype = writes_in(recipe, pair, on_cpu=device.is_cpu)
        total += student_share * decoding_seconds(recipe, pair.student.sizes, work, device, dtype)
    if teacher_share and place in ("live", "remote") and pair.teacher is not None:
        total += teacher_share * decoding_seconds(
            recipe, pair.teacher.sizes, work, device, teacher_dtype(recipe)
        )
    return total / recipe.rollouts.reuse


def decoding_seconds(
    recipe: Recipe, sizes: Sizes, work: Work, device: DeviceSpec, dtype: str
) -> float:
    """Seconds to write a step's rollouts of one device, row by row in its batches of rows."""
    rows = min(recipe.sampling.batch_size, work.num_rollouts)
    num_batches = work.num_rollouts / rows
    flops, item, num = sizes.flops, BYTES[dtype], work.completion_tokens
    length = work.prompt_tokens + num / 2
    share = 1.0 if device.is_measured else EFFICIENCY["reading"]
    read = item * (sizes.read_by(rows) + sizes.head_weights + rows * length * sizes.cached_numbers)
    read += rows * sizes.vocab_size * (item + drawing_bytes(recipe.sampling, dtype))
    one_token = flops.per_token + flops.head + (flops.per_pair or 0) * length
    token = max(
        rows * one_token / _products(device, dtype),
        read / (device.reading * share),
        sizes.num_layers * device.a_layer,
    )
    prompts = rows * flops.backbone(work.prompt_tokens) / _products(device, dtype)
    return num_batches * (prompts + num * token)
