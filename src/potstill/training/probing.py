"""Probes of the length gate: what the student writes to held-out prompts at the current window."""

from collections.abc import Mapping
from typing import Any

import torch

from potstill.config import Recipe
from potstill.kl.fused import fused_statistics
from potstill.models import distributed
from potstill.models.distributed import World
from potstill.models.flops import rollout_flops, training_flops
from potstill.rollouts.batching import batch_places, make_batch
from potstill.rollouts.prefixes import Writing, from_one
from potstill.rollouts.text import is_loop
from potstill.seeds import Stream, stream_key
from potstill.training.controllers import Probe, WindowState
from potstill.training.metrics import before_answer
from potstill.training.setup import Setup
from potstill.types import Rollout, Writer


@torch.no_grad()
def probe_window(
    recipe: Recipe, setup: Setup, decoders: Mapping[Writer, Any], state: WindowState, step: int, world: World
) -> tuple[Probe, int]:
    """Let the student write to the held-out prompts, measure it, and count the operations of this rank.

    Entropies are those of the models themselves, at temperature 1 and without truncation. The teacher's share of cut
    responses is measured once a window: by letting it write, or from the cache. Ranks share the prompts.
    """
    prompts = setup.probes[world.rank :: world.size]
    numbers = range(world.rank, len(setup.probes), world.size)
    seeds = [stream_key((recipe.train.seed, step, number), Stream.PROBE) for number in numbers]
    writing = Writing(
        recipe.objective,
        decoders,
        state.tokens,
        setup.ends.stop_ids,
        recipe.sampling,
        len(setup.probes),
        setup.loss.vocab_size,
        setup.cache,
    )
    # The whole copy that decodes: ranks do not take the same number of passes here.
    student = setup.student.around(decoders["student"], "student")
    rollouts = from_one("student", writing, prompts, seeds)
    flops = rollout_flops(rollouts, {"student": setup.student_flops}, by_token=False)
    scores_teacher = recipe.window.reference == "teacher" and setup.teacher is not None and setup.teacher.can_score
    texts = student.tokenizer.batch_decode([list(r.completion_ids) for r in rollouts], skip_special_tokens=True)
    num_tokens = entropy = teacher_entropy = 0.0
    options = setup.loss.shared_options() | {"temperature": 1.0}
    for places in batch_places(rollouts, recipe.train.tokens_per_batch):
        batch = make_batch([rollouts[place] for place in places], world.device)
        sides: list[Any] = [student(batch.input_ids_BT)[batch.loss_mask_BT], student.head]
        if scores_teacher and setup.teacher is not None:
            sides += [setup.teacher.signal_at(batch), setup.teacher.head]
        stats = fused_statistics(*sides, **options)
        is_before_N = before_answer(batch, [texts[place] for place in places], student.tokenizer, setup.answer_end)
        num_tokens += float(is_before_N.sum())
        entropy += float(stats.student_entropy_N[is_before_N].double().sum())
        if stats.teacher_entropy_N is not None:
            teacher_entropy += float(stats.teacher_entropy_N[is_before_N].double().sum())
    scored = training_flops(rollouts, setup.student_flops, setup.teacher_flops if scores_teacher else None)
    # Forward alone: of the head's three products of the student, one.
    num_scored = sum(len(rollout.completion_ids) for rollout in rollouts)
    flops += scored["student_forward"] + scored["teacher"] + scored["head"] - 2 * num_scored * setup.student_flops.head
    num_cut, num_teachers_cut = _num_cut(rollouts), 0.0
    if state.teacher_truncation is None:
        if setup.cache is not None:
            num_teachers_cut = _num_cut([setup.cache.rollout(prompt, state.tokens) for prompt in prompts])
        elif setup.teacher is not None and setup.teacher.decoder is not None and setup.teacher_flops is not None:
            written = from_one("teacher", writing, prompts, seeds)
            num_teachers_cut = _num_cut(written)
            flops += rollout_flops(written, {"teacher": setup.teacher_flops}, by_token=False)
    num_loops = float(sum(map(is_loop, texts)))
    sums = [num_tokens, entropy, teacher_entropy, num_cut, num_teachers_cut, num_loops, float(len(rollouts))]
    sums = distributed.sum_over_ranks(sums, world)
    num_tokens, entropy, teacher_entropy, num_cut, num_teachers_cut, num_loops, num = sums
    known = state.teacher_truncation
    probe = Probe(
        entropy=entropy / num_tokens,
        teacher_entropy=teacher_entropy / num_tokens if scores_teacher else None,
        truncation=num_cut / num,
        teacher_truncation=num_teachers_cut / num if known is None else known,
        repetition=num_loops / num,
    )
    return probe, flops


def _num_cut(rollouts: list[Rollout]) -> float:
    return float(sum(rollout.stop == "length" for rollout in rollouts))
