"""Disk that a run fills, and that a teacher cache takes of each token."""

from dataclasses import dataclass

from potstill.config import CacheOptions, Recipe
from potstill.planning.memory import moment_bytes
from potstill.planning.sizes import BYTES, Sizes

STORED = BYTES | {"int8": 1}


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes of a run folder: of a `checkpoint`, of which there are `num_checkpoints` at most, and
    of the finished `student`."""

    checkpoint: int
    num_checkpoints: int
    student: int

    @property
    def most(self) -> int:
        return self.num_checkpoints * self.checkpoint + self.student


def disk_of(recipe: Recipe, student: Sizes) -> Disk:
    """The disk of a run. A checkpoint of a student with an adapter has the adapter alone."""
    dtype = recipe.student.dtype
    learns, whole = student.trained_bytes(dtype), student.weight_bytes(dtype)
    weights = learns if student.num_adapter else whole
    merged = whole - student.num_adapter * BYTES["float32"]
    teacher = 0
    if recipe.teacher.follows_every is not None:
        learning = student.num_adapter or student.num_weights
        teacher = learning * BYTES["float32"] if recipe.teacher.ema is not None else weights
    return Disk(
        checkpoint=weights + teacher + moment_bytes(recipe, student),
        # A new checkpoint is whole before an old one goes.
        num_checkpoints=(recipe.train.keep_checkpoints or 1) + 1,
        student=learns if recipe.student.lora.save == "adapter" else merged,
    )


def bytes_a_token(options: CacheOptions, teacher: Sizes, top_k: int) -> int:
    """Bytes of a teacher cache for each token of a completion: its id, and the signal."""
    of_id = 2 if teacher.vocab_size <= 2**16 else 4
    if options.payload == "completions":
        return of_id
    if options.payload == "topk":
        # Ids and log-probabilities, those of the rest and of the end class, and the entropy.
        return of_id + top_k * (4 + 4) + 3 * 4
    # A scale for int8; log-sum-exp, entropy and log-probability of the written token.
    scale = 4 if options.dtype == "int8" else 0
    return of_id + teacher.width * STORED[options.dtype] + scale + 3 * 4
