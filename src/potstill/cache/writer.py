"""The student that writes a cache: a run's as it is now, one of a run's checkpoints, or any
model."""

from dataclasses import dataclass
from pathlib import Path

from potstill.config import Recipe, load_recipe
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel, fingerprint, is_run
from potstill.runs.run_folder import last_row
from potstill.teachers.manifest import StudentIdentity
from potstill.training import checkpoint
from potstill.training.setup import load_student
from potstill.types import ModelError


@dataclass(frozen=True, kw_only=True)
class WriterPlace:
    """Where a writer's weights are: a model, or a run's checkpoint; with the run and its steps,
    where it is a run's."""

    name: str
    run: Path | None = None
    checkpoint: Path | None = None
    step: int | None = None


def place_of_writer(name: str) -> WriterPlace:
    """The place that a name stands for. Raises ModelError for a run without a checkpoint."""
    folder = Path(name)
    run = folder.parent.parent
    if folder.parent.name == "checkpoint" and is_run(run):
        if not (folder / checkpoint.STATE).is_file():
            raise ModelError(
                f"{name!r} is no checkpoint of the run {str(run)!r}; name one that is there, or "
                "the run itself for its student as it is now"
            )
        return WriterPlace(name=name, run=run, checkpoint=folder, step=checkpoint.step_of(folder))
    if not is_run(folder):
        return WriterPlace(name=name)
    if (folder / "DONE").exists():
        return WriterPlace(name=name, run=folder, step=last_row(folder)["step"])
    newest = checkpoint.latest(folder)
    if newest is None:
        raise ModelError(
            f"run {name!r} has no checkpoint yet, so its student is not known; let it write one, "
            "or name a model"
        )
    return WriterPlace(name=name, run=folder, checkpoint=newest, step=checkpoint.step_of(newest))


def load_writer(
    recipe: Recipe, world: World, given=None, tokenizer=None
) -> tuple[LanguageModel, StudentIdentity]:
    """The student that writes, and who it is: what is given, or what `student.model` names; of a
    run that is not finished as its newest checkpoint has it."""
    is_object = given is not None and not isinstance(given, str | Path)
    place = (
        WriterPlace(name="") if is_object else place_of_writer(str(given or recipe.student.model))
    )
    of_run = None if place.run is None else load_recipe(place.run / "recipe.toml")
    if place.checkpoint is None:
        student = load_student(recipe, world, given, tokenizer)
    else:
        assert of_run is not None, "a checkpoint is a run's"
        student = load_student(of_run, world)
        checkpoint.load_weights(place.checkpoint, student)
    return student.eval(), StudentIdentity(
        name=str(place.run or place.name or student.name),
        parameters=fingerprint(student),
        run=None if of_run is None else of_run.identity(),
        step=place.step,
    )
