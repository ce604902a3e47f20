"""The options of a cache, which are those of a command and no recipe's."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Contents of a cache: whose completions, how many, what it stores for each token, and in what
    portions."""

    writer: Literal["teacher", "student", "dataset"] | None = None
    """Who writes the completions. By default the data where objective.prefix is dataset, else the
    teacher."""
    model: str | None = None
    """writer = student: a run, whose student writes as it is now; one of its checkpoints; or any
    model. By default student.model."""
    payload: Literal["hidden", "topk", "completions"] = "hidden"
    """hidden: the teacher's last hidden states, exact for every KL; topk: its objective.top_k
    likeliest tokens; completions: the text alone, which the teacher scores live."""
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Type of the stored hidden states. What rounding changes is measured and printed, in nats."""
    completions: int = 1
    """Completions of each prompt."""
    rollouts_per_shard: int = 128
    """Prompts with a completion in one file, which is what a kill loses at most on each rank."""
