"""Validation: both models on prompts that are not trained on, before the first step, between steps
and after the last.

The prompts and the random numbers are the same each time, and for all seeds. The teacher writes
once; its completions are kept in the run folder. A validation that a kill has cut off the log is
done again, and finds the same.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill import files
from potstill.config import Sampling
from potstill.console.progress import StepDisplay
from potstill.evaluation.quality import STUDENT, TEACHER, Pair, Sums, estimates, measure
from potstill.models import distributed
from potstill.prompts.held_out import HeldOut, every_steps
from potstill.rollouts.prefixes import Writing, from_one, now_or_before, written_rollout
from potstill.runs.run_folder import RunError, read_json
from potstill.seeds import Key, Stream, stream_key
from potstill.teachers.sharded import wait_for_passes
from potstill.training import checkpoint
from potstill.training.controllers import next_best
from potstill.training.rates import is_extended_at, is_spent, planned_steps
from potstill.training.setup import Setup, writing_of
from potstill.training.state import Run, Trainer
from potstill.training.step import naming_the_step
from potstill.types import Prompt, Rollout, Stop

LOG, TEACHERS_FILE = "validation.jsonl", "validation_teacher.json"


def is_due(trainer: Trainer, run: Run) -> bool:
    """Whether the student is validated as it is: at both ends, every so many steps, and where an
    extended run ended."""
    settings = trainer.settings
    if trainer.setup.held_out is None:
        return False
    if (
        run.step == 0
        or is_extended_at(settings, run.step)
        or is_spent(settings, run.step, run.flops)
    ):
        return True
    every = every_steps(trainer.recipe, planned_steps(settings, run.step - 1))
    # By default the prompts are held out by the number of steps in the end, which may once have
    # been too few.
    return every is not None and run.step % every == 0


def validate_if_due(trainer: Trainer, run: Run, display: StepDisplay) -> Run:
    """The run with what its validation shows, which is logged; the same run where none is due.

    Ranks share the prompts; each knows the result.
    """
    held_out = trainer.setup.held_out
    if held_out is None or not is_due(trainer, run):
        return run
    recipe, student, world = trainer.recipe, trainer.setup.student, trainer.world
    student.eval()
    trainer.bring_up(run.step)
    with naming_the_step(run.step - 1, held_out.prompts):
        mine = _measured(trainer, held_out)
        wait_for_passes(trainer.setup.teacher)
        sums = _over_ranks(mine, trainer)
    distributed.reshard(student)
    found = estimates(sums)
    row: dict[str, Any] = {
        "step": run.step,
        "num_prompts": len(sums),
        "max_tokens": recipe.validation.cap(recipe.window.tokens),
        **found,
        "seconds": round(display.lap(), 4),
    }
    if world.is_main:
        files.append(trainer.folder / LOG, row)
    display.note(f"validation {_when(run.step)}: {validation_text(row)}")
    return _with_best(trainer, run, row)


def _with_best(trainer: Trainer, run: Run, row: dict[str, Any]) -> Run:
    """The run with its best validation so far, whose student is kept if this is the one. Every rank
    must call this."""
    goal = trainer.recipe.validation.keep_best
    if goal is None:
        return run
    best = next_best(goal, run.best, run.step, row[goal][0])
    if best.step == run.step:
        setup = trainer.setup
        lora = trainer.recipe.student.lora
        weights = checkpoint.weights(setup.student, trainer.decoder, lora)
        if trainer.world.is_main:
            checkpoint.stage_best(
                trainer.folder, run.step, setup.student, weights, setup.ends.stop_ids, row
            )
    if is_extended_at(trainer.settings, run.step):
        best = dataclasses.replace(best, num_since=0)
    return dataclasses.replace(run, best=best)


def is_exhausted(trainer: Trainer, run: Run) -> bool:
    """Whether so many validations in a row were not better that the run is to end."""
    patience = trainer.recipe.validation.patience
    return patience is not None and run.best.num_since >= patience


def _when(step: int) -> str:
    return f"after step {step}" if step else "before the first step"


def validation_text(row: dict[str, Any]) -> str:
    """The values of a validation that a line has room for."""
    parts = []
    for writer in (TEACHER, STUDENT):
        names = [f"{writer}_prefix_{direction}_kl" for direction in ("forward", "reverse")]
        if all(name in row for name in names):
            forward, reverse = (row[name][0] for name in names)
            parts.append(f"on {writer}'s text KL fwd {forward:.4f} rev {reverse:.4f}")
    parts.append(f"entropy {row['student_entropy_before_answer'][0]:.3f}")
    parts.append(f"length {row['length'][0]:.0f}")
    parts += [f"{name} {row[name][0]:.0%}" for name in ("truncation", "repetition") if row[name][0]]
    if "score" in row:
        parts.append(f"score {row['score'][0]:.3f}")
    return "  ".join(parts)


def _measured(trainer: Trainer, held_out: HeldOut) -> list[Sums]:
    """The sums of this rank's prompts, in their order."""
    setup, recipe, world = trainer.setup, trainer.recipe, trainer.world
    prompts = held_out.prompts[world.rank :: world.size]
    keys = [
        stream_key((0, 0, place), Stream.VALIDATION)
        for place in range(world.rank, len(held_out.prompts), world.size)
    ]
    writing = writing_of(
        recipe, setup, trainer.engines, recipe.validation.cap(recipe.window.tokens)
    )
    # As the models are, whatever training draws from them.
    sampling = Sampling(batch_size=recipe.sampling.batch_size)
    writing = dataclasses.replace(writing, sampling=sampling)

    def pair(teacher) -> Pair:
        return Pair(
            student=trainer.measured,
            teacher=teacher,
            vocab_size=setup.loss.vocab_size,
            end_class=setup.loss.end_class,
            backend=setup.loss.backend,
            tokens_per_batch=recipe.train.tokens_per_batch,
            answer_end=held_out.answer_end,
            ranks=trainer.ranks_that_pass,
        )

    teacher = setup.compared
    # Without a head no whole distribution is known.
    scoring = teacher if teacher and teacher.can_score and teacher.head is not None else None
    sums: list[Sums] = [{} for _ in prompts]
    written = _of_teacher(trainer, writing, held_out.prompts, prompts, keys)
    taught, others = _parted(setup, prompts)
    # Also where this rank has no prompts: ranks may pass together.
    if distributed.max_over_ranks(len(written), world):
        theirs = [written[place] for place in taught]
        for place, found in zip(taught, measure(pair(setup.teacher), TEACHER, theirs), strict=True):
            sums[place] |= found
    # Also where this rank has no prompts: an engine may be all ranks'.
    rollouts = from_one(STUDENT, writing, prompts, keys)
    # A task may know the problems that it made; a function of the user's own scores all alike.
    scorer = held_out.task if recipe.reward.source is None else setup.grader
    for places, by in ((taught, scoring), (others, None)):
        mine = [rollouts[place] for place in places]
        measured = measure(pair(by), STUDENT, mine, task=scorer)
        for place, found in zip(places, measured, strict=True):
            sums[place] |= found
    return sums


def _parted(setup: Setup, prompts: Sequence[Prompt]) -> tuple[list[int], list[int]]:
    """The places of prompts that the first teacher teaches, and of those that others do."""
    first = setup.teachings[0] if setup.teachings else None
    taught: list[int] = []
    others: list[int] = []
    for place, prompt in enumerate(prompts):
        (taught if first is None or first.is_for(prompt) else others).append(place)
    return taught, others


def _over_ranks(mine: list[Any], trainer: Trainer) -> list[Any]:
    """All ranks' values, one a prompt, in the order of the prompts."""
    parts = distributed.gather(mine, trainer.world)
    return [parts[place % len(parts)][place // len(parts)] for place in range(sum(map(len, parts)))]


def _of_teacher(
    trainer: Trainer,
    writing: Writing,
    all_prompts: Sequence[Prompt],
    prompts: Sequence[Prompt],
    keys: Sequence[Key],
) -> list[Rollout]:
    """The teacher's rollouts for this rank's prompts: from the cache, written once for this run, or
    written now if it changes.

    Nothing where it cannot write, or not score what it writes.
    """
    teacher, world = trainer.setup.teacher, trainer.world
    if teacher is not None and not teacher.can_score:
        return [] if writing.cache is None else now_or_before(TEACHER, writing, prompts, keys)
    if "teacher" not in trainer.engines:
        return []
    path = trainer.folder / TEACHERS_FILE
    asked = files.json_digest(
        [[prompt.ids_of("teacher") for prompt in all_prompts], writing.window, writing.end_ids]
    )
    known = _read_written(path, asked) if world.is_main and trainer.follower is None else None
    known = distributed.gather(known, world)[0]
    if known is None:
        written = from_one(TEACHER, writing, prompts, keys) if prompts else []
        known = _over_ranks(
            [(rollout.completion_ids, rollout.stop) for rollout in written], trainer
        )
        if world.is_main and trainer.follower is None:
            texts = trainer.setup.student.tokenizer.batch_decode([list(ids) for ids, _ in known])
            rows = [
                {"prompt": prompt.example.id, "text": text, "completion_ids": ids, "stop": stop}
                for prompt, text, (ids, stop) in zip(all_prompts, texts, known, strict=True)
            ]
            files.write_atomically(path, files.seal({"asked": asked, "completions": rows}))
    mine = known[world.rank :: world.size]
    return [
        written_rollout(prompt, tuple(ids), (TEACHER,) * len(ids), stop)
        for prompt, (ids, stop) in zip(prompts, mine, strict=True)
    ]


def _read_written(path: Path, asked: str) -> list[tuple[list[int], Stop]] | None:
    """The teacher's completions that are there; None where there are none, or those of another
    question.

    Raises RunError where the file was changed.
    """
    if not path.exists():
        return None
    found = files.unseal(read_json(path))
    if found is None:
        raise RunError(
            f"{str(path)!r} was changed after it was written; remove it, and the teacher writes "
            "it again"
        )
    if found["asked"] != asked:
        return None
    return [(row["completion_ids"], row["stop"]) for row in found["completions"]]
