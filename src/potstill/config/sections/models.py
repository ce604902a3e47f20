"""The fields of the two models."""

from typing import Annotated, Literal

from pydantic import Field

from potstill.config.roles import Place, Role
from potstill.config.section import Section
from potstill.config.values import MANY_AT_ONCE, DeviceName, Filled, Url


class Lora(Section, role=Role.MODEL):
    """An adapter (LoRA, by peft): the student's weights stay as they are, and beside each matrix W
    two narrow ones learn B A, so that the model computes with W + alpha / rank · B A. It takes the
    extra `lora`."""

    rank: int | None = Field(default=None, ge=1, le=MANY_AT_ONCE)
    """Width of the narrow matrices; by default there is no adapter and all weights learn."""
    alpha: float = Field(default=32, gt=0)
    """The factor of the adapter is alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Matrices that have an adapter: ends of their names, such as ["q_proj", "v_proj"], or
    all-linear, which is every linear layer but the head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of what the adapter reads, with student.dropout."""
    save: Annotated[Literal["merged", "adapter"], Role.OUTPUT] = "merged"
    """Content of the run's folder `model`. merged: a whole model, which any program reads;
    adapter: the adapter alone, a folder of peft that names its base."""


class StudentSpec(Section, role=Role.MODEL):
    model: Annotated[str, Place.FIRST] = "potstill:base"
    """Folder or hub id of a Hugging Face causal LM; potstill:base is the shipped one."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: the model's configuration and tokenizer with fresh weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights. In bfloat16 small updates are rounded away, which is warned of;
    for its speed keep float32 and set train.compute_dtype."""
    attention: Annotated[
        Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None, Role.ROUNDING
    ] = None
    """Implementation of attention; by default sdpa where the model has it. The flash ones take a
    GPU, their package, and dtype = bfloat16."""
    dropout: bool = False
    """Train with the dropout that the model's configuration has. Without it the loss is of the same
    distribution that writes the student's completions and that is evaluated."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings."""
    lora: Lora = Lora()


class TeacherModel(Section, role=Role.MODEL):
    """A model that teaches, how much it counts, and where it is."""

    model: Annotated[str, Place.FIRST]
    """Folder or hub id of a Hugging Face causal LM; start is the student as it was before the first
    step."""
    weight: Annotated[float, Role.OBJECTIVE] = Field(default=1.0, gt=0)
    """Weight of its divergence in the loss, where there are several teachers."""
    only: Annotated[tuple[str, ...] | None, Role.OBJECTIVE] = Field(default=None, min_length=1)
    """Prompts that it teaches, where there are several teachers: their levels,
    as data.level_column has them; by default all. A token's loss is the weighted sum over the
    teachers of its prompt."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the teacher's weights."""
    attention: Annotated[
        Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None, Role.ROUNDING
    ] = None
    """As student.attention, for the teacher."""
    url: Annotated[Url | Annotated[tuple[Url, ...], Field(min_length=1)] | None, Role.ROUNDING] = (
        None
    )
    """URL of a server that has the teacher's body, or several of the same: `potstill serve`, or a
    pooling server of vLLM (docs/teachers.md). Of teacher.model only the head is read here."""
    protocol: Annotated[Literal["states", "logprobs"], Role.ROUNDING] = "states"
    """Content of the answers of teacher.url. states: last hidden states, for any divergence;
    logprobs: log-probabilities of prompts (`prompt_logprobs`), as any server of vLLM gives them,
    for objective.signal = sampled, topk or spans. Of teacher.model no weights are then read."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the hidden states that teacher.url sends; bfloat16 loses nothing where the server
    computes in it."""
    token_variable: Annotated[str | None, Role.OUTPUT] = None
    """Environment variable with the token that teacher.url wants."""
    patience: Annotated[float, Role.OUTPUT] = Field(default=600, gt=0, le=86_400)
    """Seconds for which a server that does not answer is asked again; then the run ends, and can go
    on."""
    placement: Annotated[Literal["replicated", "sharded", "offloaded"], Role.ROUNDING] = (
        "replicated"
    )
    """Where the weights are. replicated: all of them on the device of each rank; sharded: a share
    on each rank, gathered layer by layer (FSDP2); offloaded: in the machine's memory, brought to
    the GPU layer by layer. A teacher that is sharded or offloaded does not write."""
    device: Annotated[DeviceName | None, Role.ROUNDING] = None
    """Device of the teacher's own, such as "cuda:1" or "cpu"; by default the student's."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings."""


class FurtherTeacher(TeacherModel, role=Role.MODEL):
    """A teacher beside the first one. It reads the student's prompts, and writes nothing."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")
    """Name in metrics and in the report."""


class TeacherSpec(TeacherModel, role=Role.MODEL):
    """The teacher, or the first of several: the one that writes, and that validation is about."""

    model: Annotated[str, Place.FIRST] = "potstill:teacher"
    """Folder or hub id of a Hugging Face causal LM; potstill:teacher is the shipped one; self is
    the student as it was before the first step, or at the last refresh."""
    refresh_steps: int | None = Field(default=None, ge=1)
    """model = self: bring the teacher up to the student every so many steps; by default never, or
    after each one with teacher.ema."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """model = self: share of its own weights that the teacher keeps when it is brought up, in
    float32, so that it follows as a moving average; by default it becomes the student."""
    template: Literal["chat", "raw"] | None = None
    """Render the teacher's prompts with its own chat template, or take them as they are; by default
    it reads the student's prompts."""
    prompt_column: str | None = None
    """Column of a file or hub data set with prompts for the teacher alone, such as the prompt and a
    hint."""
    prompt_template: Filled | None = None
    """As data.prompt_template, for the teacher alone; in place of teacher.prompt_column."""
    cache: Annotated[str | None, Role.CACHE] = None
    """Folder that `potstill cache build` wrote: completions and signal come from it, and the
    teacher is not loaded."""

    @property
    def follows_every(self) -> int | None:
        """After how many steps each the teacher is brought up to the student; None where it never
        is."""
        if self.ema is not None and self.refresh_steps is None:
            return 1
        return self.refresh_steps
