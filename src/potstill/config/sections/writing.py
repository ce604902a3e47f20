"""The fields of writing: how tokens are drawn, and what rollouts are made of them."""

from typing import Annotated, Literal

from pydantic import Field

from potstill.config.roles import Role
from potstill.config.section import Section
from potstill.config.values import Temperature


class Sampling(Section, role=Role.OBJECTIVE):
    temperature: Temperature = 1.0
    """0 is greedy. 1 with no truncation samples exactly from the model."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens with at least this mass."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    batch_size: Annotated[int, Role.ROUNDING] = Field(default=64, ge=1)
    """Rows decoded together. It changes a model's numbers by rounding alone, and so a token once in
    very many."""


class Rollouts(Section, role=Role.OBJECTIVE):
    reuse: int = Field(default=1, ge=1)
    """Optimiser steps that each set of rollouts serves. Their age in steps is logged."""
    engine: Annotated[Literal["native", "vllm"], Role.BACKEND] = "native"
    """Who decodes. native: this process; vllm: a vLLM server beside it, with the fields of
    `engine`. Each has random numbers of its own."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, Role.BACKEND] = None
    """Type of the weights that write the student's completions. bfloat16: a copy of the student's,
    renewed after each update, half as many bytes a token; its log-probabilities are compared with
    the trainer's. By default that of the student's passes (train.compute_dtype)."""
    end_set: Literal["union", "student"] = "union"
    """Tokens that end a completion, in training, evaluation and the exported model. union: any end
    token of student or teacher; student: the student's own alone, which is how a mismatch of end
    tokens drives responses to the length cap."""
