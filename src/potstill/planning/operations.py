"""Operations of a step, by part: those that a run logs, and those that are done twice.

A run counts its own rollouts (`models.flops`); here the same functions count rollouts of given
lengths.
"""

from collections.abc import Mapping

from potstill.config import Recipe
from potstill.kl.plan import buffers_of
from potstill.models.flops import ModelFlops, rollout_flops, training_flops
from potstill.planning.memory import Outlines, TeacherPlace, loss_plan
from potstill.planning.work import Work, rollout_like
from potstill.runs.schema import FLOPS_PARTS
from potstill.types import Writer


def operations_of(
    recipe: Recipe, pair: Outlines, work: Work, place: TeacherPlace
) -> dict[str, float]:
    """The operations of one device in a step, by the parts of `runs.schema.FLOPS_PARTS`, and those
    that memory makes it do twice, which a run does not log: of the loss (`again`) and of the
    student's layers (`layers_again`).

    A cached or remote teacher's own passes are not among them, as they are done elsewhere.
    """
    student = pair.student.sizes.flops
    teacher = _flops_here(pair, place) if recipe.objective.has_divergence else None
    counted = training_flops(
        [rollout_like(work, "student")],
        student,
        teacher,
        looks_ahead=recipe.objective.gamma > 0,
        others=_others(recipe, pair),
    )
    parts = {part: float(work.num_rollouts * counted[part]) for part in FLOPS_PARTS}
    written = sum(
        share * rollout_flops([rollout_like(work, writer)], models, by_token)
        for writer, share, models, by_token in _writing(recipe, pair, place)
    )
    parts["rollout"] = work.num_rollouts * written / recipe.rollouts.reuse
    parts["again"] = work.num_batches * computed_again(recipe, pair, work)
    is_run_again = recipe.train.activation_checkpointing
    parts["layers_again"] = parts["student_forward"] if is_run_again else 0.0
    return parts


def teacher_elsewhere(recipe: Recipe, pair: Outlines, work: Work, place: TeacherPlace) -> float:
    """The operations for one device's rollouts that a remote teacher does on its own devices."""
    if place != "remote" or pair.teacher is None:
        return 0.0
    flops = pair.teacher.sizes.flops
    done = training_flops([rollout_like(work, "student")], pair.student.sizes.flops, flops)
    return float(work.num_rollouts * done["teacher"])


def computed_again(recipe: Recipe, pair: Outlines, work: Work) -> float:
    """Operations of the loss of a batch that find their tiles gone after the first pass, as
    `kl.walk` keeps those of the wider model first."""
    if recipe.train.loss_backend == "plain" or recipe.objective.signal == "topk":
        return 0.0
    num, vocab_size = work.loss_tokens, pair.student.sizes.vocab_size
    sides = [pair.student.sizes]
    if pair.teacher is not None and recipe.objective.has_divergence:
        sides.append(pair.teacher.sizes)
    sides.sort(key=lambda sizes: -sizes.width)
    plan = loss_plan(recipe, pair, num)
    buffers = buffers_of(plan, num, vocab_size, len(sides))
    per_side, total = buffers.num_tiles, 0.0
    for start in range(0, num, plan.group_rows):
        rows = min(plan.group_rows, num - start)
        # A last group that is smaller has as many tiles of a side as its blocks make.
        tiles = per_side * -(-rows // plan.rows) // (plan.group_rows // plan.rows)
        for place, sizes in enumerate(sides):
            kept = min(max(buffers.num_resident - place * per_side, 0), tiles)
            total += (1 - kept / tiles) * rows * 2 * vocab_size * sizes.width
    return total


def _others(recipe: Recipe, pair: Outlines) -> list[ModelFlops]:
    """Those of models beside the first teacher, each as if it taught every prompt."""
    others = [pair.student.sizes.flops] if recipe.reward.start_kl else []
    for spec, outline in zip(recipe.teachers, pair.further, strict=True):
        flops = outline.sizes.flops
        others.append(flops if spec.url is None else _of_head(flops))
    return others


def _of_head(flops: ModelFlops) -> ModelFlops:
    return ModelFlops(per_token=0, per_pair=0, head=flops.head)


def _flops_here(pair: Outlines, place: TeacherPlace) -> ModelFlops | None:
    """The teacher's operations on this device: all of a live one, the head of one elsewhere."""
    if pair.teacher is None or place == "none":
        return None
    flops = pair.teacher.sizes.flops
    return flops if place == "live" else _of_head(flops)


def _writing(
    recipe: Recipe, pair: Outlines, place: TeacherPlace
) -> list[tuple[Writer, float, Mapping[Writer, ModelFlops], bool]]:
    """Who writes here, which share of the rollouts, with which models, and whether by turns."""
    objective = recipe.objective
    if place == "cached":
        return []
    models: dict[Writer, ModelFlops] = {"student": pair.student.sizes.flops}
    if pair.teacher is not None and place == "live":
        models["teacher"] = pair.teacher.sizes.flops
    if objective.prefix == "student":
        return [("student", 1.0, models, False)]
    if objective.prefix == "teacher":
        return [("teacher", 1.0, models, False)] if place == "live" else []
    if objective.prefix == "mixed":
        share, by_token = objective.student_share, objective.prefix_mix == "token"
        if by_token:
            return [("teacher", 1.0, models, True)]
        return [("student", share, models, False), ("teacher", 1 - share, models, False)]
    return []
