"""Both models on the same prompts: exact KLs on what either has written, and what else a student
shows without a task.

The two axes of the grid give four numbers: forward and reverse KL, on completions of the teacher
and of the student.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from potstill.answers.grading import Grade
from potstill.kl.fused import fused_statistics
from potstill.models import distributed
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel
from potstill.rollouts.batching import batch_places, make_batch
from potstill.rollouts.text import is_loop, num_tokens_to_answer, responses
from potstill.statistics import Estimate, ratio_over_problems
from potstill.teachers.protocol import Teacher
from potstill.types import Example, Rollout

TEACHER, STUDENT = "teacher", "student"
# Numbers of one prompt: sums over a completion's tokens, in nats, and counts; names begin with who
# wrote it.
Sums = dict[str, float]


class Quantity(NamedTuple):
    """A ratio of sums over prompts, or e to the power of minus that."""

    above: str
    below: str
    is_perplexity: bool = False


QUANTITIES: dict[str, Quantity] = {
    "teacher_prefix_forward_kl": Quantity("teacher/forward_kl", "teacher/length"),
    "teacher_prefix_reverse_kl": Quantity("teacher/reverse_kl", "teacher/length"),
    "student_prefix_forward_kl": Quantity("student/forward_kl", "student/length"),
    "student_prefix_reverse_kl": Quantity("student/reverse_kl", "student/length"),
    "student_perplexity": Quantity(
        "teacher/student_log_prob", "teacher/length", is_perplexity=True
    ),
    "teacher_log_prob": Quantity("student/teacher_log_prob", "student/length"),
    "student_entropy_before_answer": Quantity(
        "student/student_entropy", "student/num_before_answer"
    ),
    "teacher_entropy_before_answer": Quantity(
        "student/teacher_entropy", "student/num_before_answer"
    ),
    "length": Quantity("student/length", "student/num"),
    "truncation": Quantity("student/is_cut", "student/num"),
    "repetition": Quantity("student/is_loop", "student/num"),
    "score": Quantity("student/score", "student/num"),
    "judged": Quantity("student/judged", "student/num"),
    "teacher_length": Quantity("teacher/length", "teacher/num"),
    "teacher_truncation": Quantity("teacher/is_cut", "teacher/num"),
    "teacher_repetition": Quantity("teacher/is_loop", "teacher/num"),
}
# Beyond it e to the power of it is no number.
LARGEST_EXPONENT = 709.0


class Scorer(Protocol):
    """Whatever scores responses: a task, or a judge of the user's own."""

    def grade(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Grade]:
        """Score each response to its example."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A student and what scores its text, over the vocabulary rows and with the class of end tokens
    that they share.

    Without a teacher only what needs none is measured. `ranks` are those that share the student,
    and pass together: all of them must call `measure`.
    """

    student: LanguageModel
    teacher: Teacher | None
    vocab_size: int | None = None
    end_class: tuple[int, ...] = ()
    backend: str = "auto"
    tokens_per_batch: int
    answer_end: Callable[[str], int | None] = lambda text: None
    ranks: World | None = None


@torch.no_grad()
def measure(
    pair: Pair,
    writer: Literal["teacher", "student"],
    rollouts: Sequence[Rollout],
    *,
    task: Scorer | None = None,
    judge: Scorer | None = None,
) -> list[Sums]:
    """Sums of both models over each completion that one of them has written, at temperature 1, and
    the task's score of it.

    Raises NonFiniteError for logits that are not finite.
    """
    passed, batches = _batches(pair, rollouts)
    texts = responses(passed, pair.student.tokenizer)
    sums: list[Sums] = [{} for _ in passed]
    for places in batches:
        for place, found in zip(
            places, _token_sums(pair, [passed[i] for i in places], texts, places), strict=True
        ):
            sums[place] = found
    sums, texts = sums[: len(rollouts)], texts[: len(rollouts)]
    for found, rollout, text in zip(sums, rollouts, texts, strict=True):
        found |= {"num": 1.0, "length": float(len(rollout.completion_ids))}
        found |= {"is_cut": float(rollout.stop == "length"), "is_loop": float(is_loop(text))}
    for name, grader in (("score", task), ("judged", judge)):
        if grader is not None and rollouts:
            grades = grader.grade([rollout.prompt.example for rollout in rollouts], texts)
            for found, grade in zip(sums, grades, strict=True):
                found[name] = grade.score
    return [{f"{writer}/{name}": value for name, value in found.items()} for found in sums]


def _batches(pair: Pair, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[list[int]]]:
    """The rollouts to pass, and their places in each batch. Ranks that share the student have as
    many batches: where one has fewer rollouts, others' stand behind its own."""
    passed, ranks = list(rollouts), pair.ranks
    if ranks is not None:
        firsts = itertools.chain(*distributed.gather(passed[:1], ranks))
        num_behind = distributed.max_over_ranks(len(passed), ranks) - len(passed)
        passed += [*firsts][:1] * num_behind
    batches = batch_places(passed, pair.tokens_per_batch)
    if ranks is not None:
        num_batches = distributed.max_over_ranks(len(batches), ranks)
        batches = batch_places(passed, pair.tokens_per_batch, max(num_batches, 1))
    return passed, batches


def _token_sums(
    pair: Pair, rollouts: list[Rollout], texts: Sequence[str], places: Sequence[int]
) -> list[Sums]:
    """Sums over the tokens of each completion of one batch; entropies up to the first answer or
    stop."""
    batch = make_batch(rollouts, pair.student.device)
    sides: list[Tensor | object] = [
        pair.student(batch.input_ids_BT)[batch.loss_mask_BT],
        pair.student.head,
    ]
    if pair.teacher is not None:
        sides += [pair.teacher.signal_at(batch), pair.teacher.head]
    stats = fused_statistics(
        *sides,  # pyright: ignore[reportArgumentType]
        labels_N=batch.target_ids_BT[batch.loss_mask_BT],
        vocab_size=pair.vocab_size,
        end_ids=pair.end_class,
        backend=pair.backend,
    )
    names = (
        "forward_kl",
        "reverse_kl",
        "student_log_prob",
        "teacher_log_prob",
        "student_entropy",
        "teacher_entropy",
    )
    columns = {name: getattr(stats, f"{name}_N") for name in names}
    known = {
        name: values_N.double().cpu() for name, values_N in columns.items() if values_N is not None
    }
    sums, first = [], 0
    for rollout, place in zip(rollouts, places, strict=True):
        ids = rollout.completion_ids
        num_before = num_tokens_to_answer(
            ids, texts[place], pair.student.tokenizer, pair.answer_end
        )
        found = {"num_before_answer": float(num_before)}
        for name, values_N in known.items():
            num = num_before if name.endswith("_entropy") else len(ids)
            found[name] = float(values_N[first : first + num].sum())
        sums.append(found)
        first += len(ids)
    return sums


def estimates(sums: Sequence[Sums]) -> dict[str, Estimate]:
    """The quantities, each with a 95 % bootstrap interval over the prompts of which it is known, if
    there are any."""
    found = {}
    for name, quantity in QUANTITIES.items():
        known = [each for each in sums if quantity.above in each and quantity.below in each]
        if known:
            parts = (
                [each[quantity.above] for each in known],
                [each[quantity.below] for each in known],
            )
            ratio = ratio_over_problems(*parts)
            found[name] = _perplexity(ratio) if quantity.is_perplexity else ratio
    return found


def _perplexity(log_prob: Estimate) -> Estimate:
    """The perplexity from a mean log-probability, whose upper end is the perplexity's lower one."""
    value, low, high = (math.exp(min(-each, LARGEST_EXPONENT)) for each in log_prob)
    return Estimate(value, high, low)
