"""Memory of one device, by part and by phase of a step.

What is there all the time follows from the numbers of weights. A phase has its own parts beside it,
and the fullest phase is the peak. Activations are counted by `passes`, on the shapes of a batch.
"""

from dataclasses import dataclass
from typing import Literal

from potstill.config import FurtherTeacher, Recipe, Sampling
from potstill.kl.fused import MIB
from potstill.kl.plan import Plan, buffers_of, make_plan
from potstill.kl.tiles import NUM_SCRATCH, SCRATCH_ELEMENTS
from potstill.planning.passes import PassBytes, pass_bytes, passes_by_rule
from potstill.planning.sizes import BYTES, Outline, Sizes
from potstill.planning.work import Work, compute_dtype_on

# Where the teacher's signal comes from; "none" where nothing asks for one.
TeacherPlace = Literal["live", "cached", "remote", "none"]
# AdamW's, a number each for every weight.
MOMENTS = 2
# Bytes that drawing takes for a logit beside itself: the difference to the largest, and its
# exponential; a copy in float32, where it is scaled or was in another type; and the search for a
# nucleus.
DRAWN, SCALED, SEARCHED = 4 + 4, 4, 34
FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Outlines:
    """Outlines of the models of a run: the teacher is None where the recipe has none, and further
    ones are those of its `teachers`."""

    student: Outline
    teacher: Outline | None
    further: tuple[Outline, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device: parts that are `kept` throughout, and those of each phase beside them.

    `is_counted` is false where activations are estimated by rule.
    """

    kept: dict[str, int]
    phases: dict[str, dict[str, int]]
    is_counted: bool

    @property
    def fullest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """The parts at the peak."""
        return self.kept | self.phases[self.fullest]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def memory_of(
    recipe: Recipe,
    pair: Outlines,
    work: Work,
    place: TeacherPlace,
    *,
    num_devices: int = 1,
    on_cpu: bool,
    by_rule: bool = False,
) -> Memory:
    """The memory of one device; on several the student is sharded, as `distributed.shard` does.

    `by_rule` estimates activations, which takes no time.
    """
    count = passes_by_rule if by_rule else pass_bytes
    shape, dtype = (work.rows, work.positions), recipe.student.dtype
    computing = compute_dtype_on(recipe, pair.student.config, on_cpu=on_cpu)
    again = recipe.train.activation_checkpointing
    passes = count(pair.student, shape, dtype, computing, again)
    writing = writes_in(recipe, pair, on_cpu=on_cpu)
    kept = _kept(recipe, pair, place, num_devices, writing)
    kept |= engine_bytes(recipe, pair, work, place, on_cpu=on_cpu)
    loss = _loss_bytes(recipe, pair, work)
    if on_cpu:
        # The tiles between the passes stay for the next batch; a GPU's allocator lends them on.
        kept["loss tiles"] = loss.pop("loss tiles")
    scoring = _states(recipe, pair, work)
    if is_here(recipe, place) and scoring and pair.teacher is not None:
        of_teacher = count(pair.teacher, shape, teacher_dtype(recipe), "float32")
        scoring["activations"] = of_teacher.forward
        sizes, item = pair.teacher.sizes, BYTES[teacher_dtype(recipe)]
        if is_spread(recipe, place, num_devices):
            # The layer that works, and the next one.
            scoring["unsharded"] = 2 * sizes.largest_layer * item
        if recipe.teacher.placement == "offloaded":
            # A layer, or the embedding, which is as large as the head.
            scoring["brought in"] = max(sizes.largest_layer, sizes.head_weights) * item
    gradients = pair.student.sizes.trained_bytes(dtype)
    phases = {
        "rollouts": _decoding(recipe, pair, work, place, writing),
        "teacher": scoring,
        **_learning(recipe, pair, work, loss | _states(recipe, pair, work), passes, num_devices),
        # The fused update has no tensors of its own.
        "update": {"gradients": gradients // num_devices},
    }
    return Memory(kept=kept, phases=phases, is_counted=passes.is_counted)


def teacher_dtype(recipe: Recipe) -> str:
    """The type of the teacher's weights, which are the student's where it is the student."""
    if recipe.teacher.ema is not None:
        return "float32"
    return recipe.student.dtype if recipe.teacher.model == "self" else recipe.teacher.dtype


def writes_in(recipe: Recipe, pair: Outlines, *, on_cpu: bool) -> str:
    """The type of the weights that write the student's completions."""
    return recipe.writes_in(compute_dtype_on(recipe, pair.student.config, on_cpu=on_cpu))


def cache_bytes(sizes, rows: int, num_tokens: int, dtype: str) -> int:
    """Keys and values of rows that are decoded together."""
    return rows * num_tokens * sizes.cached_numbers * BYTES[dtype]


def shares_base(recipe: Recipe, num_devices: int) -> bool:
    """Whether what the student was at first is its base with the adapter off, and no copy."""
    return recipe.student.lora.rank is not None and num_devices == 1


def is_here(recipe: Recipe, place: TeacherPlace) -> bool:
    """Whether the teacher computes on the device of the student."""
    return place == "live" and recipe.teacher.device is None


def is_spread(recipe: Recipe, place: TeacherPlace, num_devices: int) -> bool:
    """Whether the teacher's weights are spread over the devices."""
    return place == "live" and recipe.teacher.placement == "sharded" and num_devices > 1


def moment_bytes(recipe: Recipe, student: Sizes) -> int:
    """Bytes of the optimiser's moments; of 8-bit ones without the scales of their blocks."""
    if recipe.train.optimizer == "adamw-8bit":
        return MOMENTS * (student.num_adapter or student.num_trained)
    return MOMENTS * student.trained_bytes(recipe.student.dtype)


def _kept(
    recipe: Recipe, pair: Outlines, place: TeacherPlace, num_devices: int, writing: str
) -> dict[str, int]:
    student, dtype = pair.student.sizes, recipe.student.dtype
    whole = student.weight_bytes(dtype)
    parts = {
        "student": whole // num_devices,
        "moments": moment_bytes(recipe, student) // num_devices,
        "teacher": _teacher_bytes(recipe, pair, place, num_devices),
    }
    if recipe.reward.start_kl and not shares_base(recipe, num_devices):
        parts["start"] = whole
    for spec, outline in zip(recipe.teachers, pair.further, strict=True):
        if spec.model != "start":
            parts[f"teacher {spec.name}"] = _further_bytes(spec, outline.sizes)
        elif not shares_base(recipe, num_devices):
            parts[f"teacher {spec.name}"] = whole
    if _has_copy(recipe, place, num_devices, is_another=writing != dtype):
        parts["decoding copy"] = student.weight_bytes(writing)
    return parts


def _has_copy(recipe: Recipe, place: TeacherPlace, num_devices: int, *, is_another: bool) -> bool:
    """Whether a device has a whole copy of the student to write with, or to probe with."""
    probes = recipe.window.schedule == "entropy-gated"
    if recipe.rollouts.engine != "native":
        return probes and num_devices > 1
    by_default = place in ("live", "remote") and recipe.teacher.follows_every is None
    is_validated = recipe.validation.is_asked_for or (
        recipe.validation.num_prompts != 0 and by_default
    )
    writes = recipe.student_writes or probes or is_validated
    return writes and (num_devices > 1 or is_another)


def _further_bytes(spec: FurtherTeacher, sizes: Sizes) -> int:
    """Bytes of a teacher beside the first one on the student's device."""
    is_elsewhere = spec.url is not None or spec.device is not None
    if is_elsewhere or spec.placement == "offloaded":
        return sizes.head_weights * BYTES[spec.dtype]
    return sizes.weight_bytes(spec.dtype)


def _teacher_bytes(recipe: Recipe, pair: Outlines, place: TeacherPlace, num_devices: int) -> int:
    if pair.teacher is None or place == "none":
        return 0
    teacher, item = pair.teacher.sizes, BYTES[teacher_dtype(recipe)]
    follows = recipe.teacher.follows_every is not None
    if recipe.teacher.model == "self" and shares_base(recipe, num_devices) and not follows:
        return 0
    if not is_here(recipe, place) or recipe.teacher.placement == "offloaded":
        # The head of a teacher elsewhere is here, which the loss applies to its states.
        return teacher.head_weights * item
    if is_spread(recipe, place, num_devices):
        # The weights outside of layers stay gathered, as no backward pass lets them go.
        in_layers = teacher.num_weights - teacher.outside_layers
        return (in_layers // num_devices + teacher.outside_layers) * item
    return teacher.weight_bytes(teacher_dtype(recipe))


def _loss_bytes(recipe: Recipe, pair: Outlines, work: Work) -> dict[str, int]:
    """Bytes that the divergence takes for a batch beside hidden states and the head's gradient."""
    student, num = pair.student.sizes, work.loss_tokens
    if recipe.train.loss_backend == "plain":
        # Logits, probabilities and their gradients, in float32.
        return {"loss tiles": 0, "logits": 4 * FLOAT32 * num * student.vocab_size}
    sides = 1 if pair.teacher is None or not recipe.objective.has_divergence else 2
    plan = loss_plan(recipe, pair, num)
    buffers = buffers_of(plan, num, student.vocab_size, sides)
    scratch = NUM_SCRATCH * max(SCRATCH_ELEMENTS, plan.columns)
    return {
        "loss tiles": FLOAT32 * buffers.num_resident * buffers.size,
        "loss": FLOAT32 * (sides * buffers.size + scratch),
    }


def loss_plan(recipe: Recipe, pair: Outlines, num_rows: int) -> Plan:
    """How the divergence of a batch is cut, as `kl.walk` does it."""
    student = pair.student.sizes
    sums_apart = recipe.student.dtype == "bfloat16" and student.trains_head
    budget = recipe.train.loss_memory * MIB
    return make_plan(num_rows, student.vocab_size, budget, one_group=sums_apart)


def _decoding(
    recipe: Recipe, pair: Outlines, work: Work, place: TeacherPlace, writing: str
) -> dict[str, int]:
    """Keys, values and logits of the rows that one model decodes together, the larger of the
    two."""
    if recipe.rollouts.engine != "native":
        return {}
    rows, longest = _rows_decoded(recipe, work)
    both = [
        {
            "KV cache": cache_bytes(sizes, rows, longest, dtype),
            "drawing": rows * sizes.vocab_size * _a_logit(recipe.sampling, dtype),
        }
        for sizes, dtype in _writers(recipe, pair, place, writing)
    ]
    return max(both, key=lambda parts: sum(parts.values()), default={})


def _rows_decoded(recipe: Recipe, work: Work) -> tuple[int, int]:
    """How many rows are decoded together, and how long they may get."""
    rows = min(recipe.sampling.batch_size, work.num_rollouts)
    return rows, work.prompt_tokens + work.completion_tokens


def _writers(
    recipe: Recipe, pair: Outlines, place: TeacherPlace, writing: str
) -> list[tuple[Sizes, str]]:
    """The models that write prefixes here, and the types of their weights."""
    prefix = recipe.objective.prefix
    writers = []
    if prefix in ("student", "mixed") and place != "cached":
        writers.append((pair.student.sizes, writing))
    if prefix in ("teacher", "mixed") and place == "live" and pair.teacher is not None:
        writers.append((pair.teacher.sizes, teacher_dtype(recipe)))
    return writers


def engine_bytes(
    recipe: Recipe, pair: Outlines, work: Work, place: TeacherPlace, *, on_cpu: bool
) -> dict[str, int]:
    """Weights, keys and values of the servers that are started to write on a device; nothing for a
    server that is there."""
    if recipe.rollouts.engine == "native" or recipe.engine.url is not None:
        return {}
    rows, longest = _rows_decoded(recipe, work)
    writers = _writers(recipe, pair, place, writes_in(recipe, pair, on_cpu=on_cpu))
    cached = [cache_bytes(sizes, rows, longest, dtype) for sizes, dtype in writers]
    return {
        "engine's weights": sum(sizes.weight_bytes(dtype) for sizes, dtype in writers),
        "engine's KV cache": sum(cached),
    }


def _a_logit(sampling: Sampling, dtype: str) -> int:
    return BYTES[dtype] + drawing_bytes(sampling, dtype)


def drawing_bytes(sampling: Sampling, dtype: str) -> int:
    """Bytes for each logit of a model in this type, beside itself, while a token is drawn."""
    is_copied = dtype != "float32" or sampling.temperature != 1 or sampling.top_k > 0
    return DRAWN + (SCALED if is_copied else 0) + (SEARCHED if sampling.top_p < 1 else 0)


def _states(recipe: Recipe, pair: Outlines, work: Work) -> dict[str, int]:
    """The teacher's hidden states at the loss tokens of a batch."""
    if pair.teacher is None or not recipe.objective.has_divergence:
        return {}
    item = BYTES[teacher_dtype(recipe)]
    return {"teacher's states": work.loss_tokens * pair.teacher.sizes.width * item}


def _learning(
    recipe: Recipe,
    pair: Outlines,
    work: Work,
    loss: dict[str, int],
    passes: PassBytes,
    num_devices: int,
) -> dict[str, dict[str, int]]:
    """Three moments of a batch's pass: at the loss, early on the way back, and at its end."""
    student, item = pair.student.sizes, BYTES[recipe.student.dtype]
    trained = student.trained_bytes(recipe.student.dtype) // num_devices
    # A layer of a sharded student is whole while it works, and what is outside of layers always.
    whole = {}
    if num_devices > 1:
        num = 2 * student.outside_layers + 3 * student.largest_layer
        whole["unsharded"] = item * num
    # Gradients of earlier batches are there; the head's is made with the loss. Where it is the
    # embedding as well, it waits for the embedding's, except where that adds its rows to it
    # (`lean.embedding`).
    is_added = recipe.student.dtype == "float32" and num_devices == 1
    earlier = trained if work.num_batches > 1 else 0
    head = student.head_weights * item if student.trains_head else 0
    waits = student.rows_tied and student.trains_head and not is_added
    last = max(earlier, trained - head, 0) + 2 * head if waits else trained
    gradients, states = earlier + head, 2 * FLOAT32 * work.loss_tokens * student.width
    return {
        "loss": whole
        | loss
        | {"hidden states": states, "activations": passes.saved, "gradients": gradients},
        "backward": whole | {"activations": passes.backward, "gradients": gradients},
        "end of backward": whole | {"gradients": last},
    }
