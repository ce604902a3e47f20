"""The fields of the data: where prompts come from, and what is made of them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.config.roles import Place, Role
from potstill.config.section import Section
from potstill.config.values import Arguments, Filled, Seed
from potstill.tasks import is_table
from potstill.tasks.tables import is_hub_id


class DataSource(Section, role=Role.DATA):
    source: str
    """A file, a pattern of files, a hub data set or a folder of one."""
    weight: float | None = Field(default=None, gt=0, le=1e6)
    """Share of the prompts that are trained on, relative to the other weights. With none at all
    each prompt comes once an epoch."""
    split: str | None = None
    """Split of a hub data set; train by default."""
    config: str | None = None
    """Configuration of a hub data set or folder that has several."""
    num_prompts: int | None = Field(default=None, ge=1, le=10**8)
    """Number of prompts, the first ones; all by default."""
    prompt_column: str | None = None
    """As data.prompt_column, for this source."""
    prompt_template: Filled | None = None
    """As data.prompt_template, for this source."""
    level: str | None = Field(default=None, min_length=1)
    """Level of all its prompts, in place of data.level_column."""


class Data(Section, role=Role.DATA):
    source: Annotated[str | tuple[str, ...], Place.FIRST] = "multiplication"
    """A task (multiplication, columns:SETTING, reasoning-gym:NAME), a task of your own
    (my_task.py:MyTask, a class in a Python file, whose code is run), a file (.jsonl, .json, .csv,
    .parquet, .txt with a prompt a line, or these and .gz), a pattern of files, a hub data set or a
    folder of one; or a list of files and data sets."""
    sources: tuple[DataSource, ...] = ()
    """Files and data sets with a weight each, in place of data.source: tables [[data.sources]] with
    `source`, `weight`, `split`, `config`, `num_prompts`, `prompt_column`, `prompt_template` and
    `level`."""
    split: str = "train"
    """Split of a task or hub data set."""
    config: str | None = None
    """Configuration of a hub data set or folder that has several."""
    num_prompts: int | None = Field(default=None, ge=1, le=10**8)
    """Number of prompts; by default all of a file, and 4096 of a task."""
    prompt_column: str = "prompt"
    """Column of a file or hub data set that holds the prompt."""
    prompt_template: Filled | None = None
    """Prompt that is filled in from columns, such as "Question: {question}\\nAnswer:", in place of
    data.prompt_column. Write a brace of the text twice."""
    level_column: str = "level"
    """Column that says of which kind a prompt is, as `only` of a teacher names kinds."""
    train_on: Literal["last", "all"] = "last"
    """objective.prefix = "dataset": the turns of the assistant's in a row's `messages` that are
    trained on. last: those at the end; all: each one, up to window.tokens after the first
    begins."""
    template: Literal["chat", "raw"] | None = None
    """Render prompts with the chat template or take them as they are; by default chat for messages,
    raw for strings. data.template_arguments.NAME tells the template more."""
    system: str | None = None
    """System prompt before every chat; a chat that has a system message of its own keeps that
    one."""
    template_arguments: Arguments = Field(default_factory=dict)
    """Arguments for the chat templates of student and teacher, such as {enable_thinking =
    false}."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a prompt; by default as many as the context leaves beside the completion."""
    too_long: Literal["refuse", "drop", "cut-left"] = "refuse"
    """Treatment of prompts that are too long: refuse the run, leave them out, or cut their first
    tokens."""
    seed: Annotated[Seed, Role.SEED] = 0
    """Seed of a task's problems."""

    @property
    def origin(self) -> str | tuple[str, ...]:
        """The name of where the prompts come from: `source`, or the names of `sources`."""
        return tuple(each.source for each in self.sources) if self.sources else self.source

    @model_validator(mode="after")
    def _has_sources_that_fit(self):
        for place, each in enumerate(self.sources):
            name = f"data.sources.{place}"
            if not is_table(each.source):
                raise ValueError(
                    f"{name}.source is the task {each.source!r}; give files and data sets, or a "
                    "task alone as data.source"
                )
            if not is_hub_id(each.source) and (each.split or each.config):
                raise ValueError(
                    f"{name}.source is the file {each.source!r}, which has no splits and no "
                    "configurations; remove split and config"
                )
            if each.prompt_column is not None and each.prompt_template is not None:
                raise ValueError(
                    f"{name} has a prompt_column and a prompt_template, which takes the place of "
                    "a column; remove one"
                )
        without = [each.source for each in self.sources if each.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(
                f"data.sources has weights, and {without[0]!r} has none; give each source a "
                "weight, or none, and then each prompt comes once an epoch"
            )
        return self
