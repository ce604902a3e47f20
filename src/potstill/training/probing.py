"""Probes of the length gate: what the student writes to held-out prompts at the current window."""

from collections.abc import Mapping
from typing import Any

import torch

from potstill.config import Recipe
from potstill.engines.protocol import Engine
from potstill.kl.fused import fused_statistics
from potstill.models import distributed
from potstill.models.distributed import World
from potstill.models.flops import ModelFlops, rollout_flops, training_flops
from potstill.models.language_model import LanguageModel
from potstill.rollouts.batching import batch_places, make_batch
from potstill.rollouts.prefixes import Writing, from_one
from potstill.rollouts.text import is_loop, responses
from potstill.seeds import Key, Stream, stream_key
from potstill.teachers.protocol import Teacher
from potstill.teachers.remote.reach import works_here
from potstill.teachers.sharded import wait_for_passes
from potstill.training.controllers import Probe, WindowState
from potstill.training.metrics import before_answer
from potstill.training.setup import Setup, writing_of
from potstill.types import Prompt, Rollout, Writer


@torch.no_grad()
def probe_window(
    recipe: Recipe,
    setup: Setup,
    engines: Mapping[Writer, Engine],
    *,
    student: LanguageModel,
    state: WindowState,
    step: int,
    world: World,
) -> tuple[Probe, float]:
    """Let the student write to the held-out prompts, measure it as `student`, and count the
    operations of this rank.

    Entropies are those of the models themselves, at temperature 1 and without truncation. The
    teacher's share of cut responses is measured once a window: by letting it write, or from the
    cache. Ranks share the prompts.
    """
    prompts = setup.probes[world.rank :: world.size]
    numbers = range(world.rank, len(setup.probes), world.size)
    seeds = [stream_key((recipe.train.seed, step, number), Stream.PROBE) for number in numbers]
    writing = writing_of(recipe, setup, engines, state.tokens)
    rollouts = from_one("student", writing, prompts, seeds)
    flops: float = rollout_flops(rollouts, {"student": setup.student_flops}, by_token=False)
    texts = responses(rollouts, student.tokenizer)
    teacher = setup.compared if recipe.window.reference == "teacher" else None
    scorer = teacher if teacher is not None and teacher.can_score else None
    batches = batch_places(rollouts, recipe.train.tokens_per_batch)
    entropies = _entropies(setup, student, scorer, rollouts, texts, batches)
    wait_for_passes(scorer)
    flops += _scoring_flops(setup, rollouts, scores_teacher=scorer is not None)
    num_cut, num_teachers_cut = _num_cut(rollouts), 0.0
    known = state.teacher_truncation
    if known is None:
        num_teachers_cut, its_flops = _num_teachers_cut(setup, writing, prompts, seeds)
        flops += its_flops
    num_loops = float(sum(map(is_loop, texts)))
    sums = [*entropies, num_cut, num_teachers_cut, num_loops, float(len(rollouts))]
    sums = distributed.sum_over_ranks(sums, world)
    num_tokens, entropy, teacher_entropy, num_cut, num_teachers_cut, num_loops, num = sums
    probe = Probe(
        entropy=entropy / num_tokens,
        teacher_entropy=None if scorer is None else teacher_entropy / num_tokens,
        truncation=num_cut / num,
        teacher_truncation=num_teachers_cut / num if known is None else known,
        repetition=num_loops / num,
    )
    return probe, flops


def _entropies(
    setup: Setup,
    student: LanguageModel,
    teacher: Teacher | None,
    rollouts: list[Rollout],
    texts: list[str],
    batches: list[list[int]],
) -> list[float]:
    """The number of tokens up to the answer, and the sums over them of both models' entropies
    (nats)."""
    num_tokens = entropy = teacher_entropy = 0.0
    options = setup.loss.shared_options() | {"temperature": 1.0}
    for batch_of in batches:
        batch = make_batch([rollouts[place] for place in batch_of], student.device)
        sides: list[Any] = [student(batch.input_ids_BT)[batch.loss_mask_BT], student.head]
        if teacher is not None:
            sides += [teacher.signal_at(batch), teacher.head]
        stats = fused_statistics(*sides, **options)
        written = [texts[place] for place in batch_of]
        is_before_N = before_answer(batch, written, student.tokenizer, setup.answer_end)
        num_tokens += float(is_before_N.sum())
        entropy += float(stats.student_entropy_N[is_before_N].double().sum())
        if stats.teacher_entropy_N is not None:
            teacher_entropy += float(stats.teacher_entropy_N[is_before_N].double().sum())
    return [num_tokens, entropy, teacher_entropy]


def _scoring_flops(setup: Setup, rollouts: list[Rollout], scores_teacher: bool) -> float:
    """Operations of the forward passes over what the student wrote."""
    scored = training_flops(
        rollouts, setup.student_flops, setup.teacher_flops if scores_teacher else None
    )
    # Forward alone: of the head's three products of the student, one.
    num_scored = sum(len(rollout.completion_ids) for rollout in rollouts)
    return (
        scored["student_forward"]
        + scored["teacher"]
        + scored["head"]
        - 2 * num_scored * setup.student_flops.head
    )


def _num_teachers_cut(
    setup: Setup,
    writing: Writing,
    prompts: list[Prompt],
    seeds: list[Key],
) -> tuple[float, float]:
    """How many of the teacher's responses the window cuts, and the operations of writing them.

    They are the cache's, or written now; both numbers are 0 for a teacher that cannot write.
    """
    if setup.cache is not None:
        cached = [setup.cache.rollout(prompt, writing.window) for prompt in prompts]
        return _num_cut(cached), 0
    teacher = setup.compared
    if teacher is None or teacher.decoder is None or setup.teacher_flops is None:
        return 0.0, 0
    written = from_one("teacher", writing, prompts, seeds)
    writers: dict[Writer, ModelFlops] = {}
    if works_here(teacher):
        writers["teacher"] = setup.teacher_flops
    return _num_cut(written), rollout_flops(written, writers, by_token=False)


def _num_cut(rollouts: list[Rollout]) -> float:
    return float(sum(rollout.stop == "length" for rollout in rollouts))
