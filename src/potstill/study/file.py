"""The file of a study: panels of groups of runs, as fields over a base recipe."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from potstill.config import Role, Section, fields_with, find_toml, read_toml, validate

SHIPPED_STUDIES = Path(__file__).parent.parent / "studies"


def _flat(value: Any) -> Any:
    """Nested tables as one with dotted names: `train.lr = 1e-3` in TOML is a table in a table."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= {f"{key}.{name}": v for name, v in _flat(inner).items()}
        else:
            flat[key] = inner
    return flat


# Fields that the study sets itself, which fields and axes may not, and what to write instead.
SET_BY_THE_STUDY = {
    "out": "give out to the study, whose runs are named by what they are",
} | dict.fromkeys(fields_with(Role.SEED), "use seeds = [...] of the study or of a group")
# A stage takes these fields from the run that it goes on from: whose prompts they are, ...
DATA_OF_THE_START = frozenset(
    f"data.{name}"
    for name in ("source", "sources", "split", "config", "prompt_column", "prompt_template")
)
# ... and all others that it may not set.
SET_BY_THE_START: dict[str, str] = dict.fromkeys(
    ("student.model", "evaluation", *sorted(DATA_OF_THE_START)),
    "the stage takes it from the run that it goes on from",
)
CORNER: tuple[str, ...] = ("objective.prefix", "objective.kl")


def refuse_fields(where: str, names: Iterable[str], known: dict[str, str]) -> None:
    """Raise ValueError for a field that the study would set to something else."""
    for name in names:
        for field, advice in known.items():
            if name == field or name.startswith(f"{field}."):
                raise ValueError(f"{where}.{name} is set by the study itself: {advice}")


class Runs(Section):
    """Runs whose fields take the place of a recipe's."""

    @model_validator(mode="after")
    def _sets_what_the_study_leaves(self):
        for part in ("fields", "axes"):
            refuse_fields(part, getattr(self, part, {}), SET_BY_THE_STUDY)
        return self


Fields = Annotated[dict[str, Any], BeforeValidator(_flat), Field(default_factory=dict)]
Axes = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=1)]],
    BeforeValidator(_flat),
    Field(default_factory=dict),
]
MethodName = Literal["sft", "dagger", "offline-rl", "opd"]


class Judgement(Section):
    """One more evaluation of each run of a group, in other settings."""

    label: str
    """Its name beside the run's."""
    fields: Fields
    """Fields of section `evaluation` that differ."""


class Stage(Runs):
    """A further run from each run of a group: its student is what that run made."""

    label: str = ""
    """The name of its runs beside their method."""
    recipe: str = "rl"
    """Base recipe; student, prompts, seeds, folder and evaluation come from the run before."""
    fields: Fields
    """Fields over the recipe's."""
    also_from: tuple[str, ...] = ()
    """Models that it starts from as well."""

    @model_validator(mode="after")
    def _leaves_what_the_start_sets(self):
        refuse_fields("fields", self.fields, SET_BY_THE_START)
        return self


class StudyGroup(Runs):
    """Runs that differ in the values of some fields."""

    label: str = ""
    """The name of its runs beside their method."""
    axes: Axes
    """Values of fields of the recipe, every combination of which is a run; `method` sets prefix and
    KL."""
    fields: Fields
    """Fields that all runs of the group share."""
    seeds: tuple[int, ...] | None = None
    """Instead of the study's."""
    sweep_as: MethodName | None = None
    """Take the swept value of this method; by default that of the axis `method`."""
    cache: bool = False
    """Runs on teacher prefixes read the teacher from a cache, which is built first."""
    then: tuple[Stage, ...] = ()
    """Further stages, each from every run."""
    judgements: tuple[Judgement, ...] = ()
    """Other evaluations of each run."""

    @model_validator(mode="after")
    def _sets_nothing_twice(self):
        own = [*self.fields, *self.axes]
        if twice := next((name for name in self.fields if name in self.axes), None):
            raise ValueError(f"{twice} is in fields and on an axis of one group; keep one of them")
        if "method" in self.axes and (
            clash := next((name for name in CORNER if name in own), None)
        ):
            raise ValueError(
                f"{clash} is set beside the axis method, which sets it; remove one of them"
            )
        if self.cache and "teacher.cache" in own:
            raise ValueError(
                "teacher.cache is set beside cache = true, which makes a cache; remove one of them"
            )
        return self


class Sweep(Runs):
    """One field, chosen for each method before methods are compared: by Avg at one seed, on
    problems of its own."""

    field: str = "train.lr"
    """The field."""
    values: tuple[float, ...] = Field(min_length=1)
    """The values to try."""
    methods: tuple[MethodName, ...] = ("sft", "dagger", "offline-rl", "opd")
    """For which methods."""
    fields: Fields
    """Further fields of the runs that decide."""
    cache: bool = False
    """As for a group."""

    @model_validator(mode="after")
    def _sets_nothing_twice(self):
        refuse_fields("field", [self.field], SET_BY_THE_STUDY)
        own = {
            self.field: "it is what is swept",
            "evaluation.seed": "a sweep is judged on problems of its own",
        }
        own |= dict.fromkeys(CORNER, "methods says which corners are swept")
        refuse_fields("fields", self.fields, own)
        return self


class PanelPlan(Runs):
    """Runs that can be compared with each other: one task, one pair of models."""

    title: str
    """As the report shows it."""
    note: str = ""
    """A note to the reader: that a setting is constructed, say."""
    recipe: str | None = None
    """Base recipe, instead of the study's."""
    fields: Fields
    """Fields of all runs of the panel."""
    models: tuple[str, ...] = ()
    """Models that are evaluated beside the runs."""
    sweep: Sweep | None = None
    """A choice that is made before anything is compared."""
    groups: tuple[StudyGroup, ...] = Field(min_length=1)
    """The runs."""

    @model_validator(mode="after")
    def _sweeps_what_no_group_sets(self):
        methods = () if self.sweep is None else self.sweep.methods
        for group in self.groups:
            if group.sweep_as is not None and group.sweep_as not in methods:
                known = f"the sweep is of {', '.join(methods)}" if methods else "nothing is swept"
                raise ValueError(
                    f'sweep_as is "{group.sweep_as}", and in this panel {known}; remove it or '
                    "sweep that"
                )
            if self.sweep is not None and any(
                m in methods for m in group.axes.get("method", [group.sweep_as])
            ):
                swept = {self.sweep.field: "the panel's sweep chooses it"}
                refuse_fields("axes", group.axes, swept)
                refuse_fields("fields", group.fields, swept)
        return self


class Study(Runs):
    """A whole study."""

    out: Path
    """Folder of the study."""
    recipe: str = "demo"
    """Base recipe: a shipped one's name, or a file beside the study's."""
    fields: Fields
    """Fields of all runs, over the recipe's."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Each run is done with each: seeds of the training problems and of sampling. Held-out problems
    stay the same."""
    panels: tuple[PanelPlan, ...] = Field(min_length=1)
    """The panels of the report."""

    @model_validator(mode="after")
    def _titles_differ(self):
        titles = [panel.title for panel in self.panels]
        if twice := next((title for title in titles if titles.count(title) > 1), None):
            raise ValueError(f"two panels have the title {twice!r}; give each its own")
        return self


def read_study_file(study: str | Path) -> Study:
    """A study from a TOML file, or a shipped one by its name. Raises RecipeError with one line.

    Base recipes that are files are found beside the study's own.
    """
    path = find_toml("study", study, SHIPPED_STUDIES)
    found = validate(read_toml(path), str(study), Study)

    def beside(recipe: str) -> str:
        return str(path.parent / recipe) if (path.parent / recipe).is_file() else recipe

    def with_recipes(group: StudyGroup) -> StudyGroup:
        then = tuple(
            stage.model_copy(update={"recipe": beside(stage.recipe)}) for stage in group.then
        )
        return group.model_copy(update={"then": then})

    panels = []
    for panel in found.panels:
        found_by = {
            "recipe": beside(panel.recipe or found.recipe),
            "groups": tuple(map(with_recipes, panel.groups)),
        }
        panels.append(panel.model_copy(update=found_by))
    return found.model_copy(update={"panels": tuple(panels)})
