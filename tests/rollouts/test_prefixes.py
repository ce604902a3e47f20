"""Mixtures of writers: exact shares, handoffs, draws from a mixture of distributions; and rollouts
used again."""

from collections import Counter

import pytest
import torch
from conftest import interrupted_at, tiny_recipe

from potstill.config import Objective, RecipeError, Sampling, make_recipe
from potstill.engines.native import NativeEngine
from potstill.models.sampling import sample
from potstill.rollouts.prefixes import Writing, student_places, write_rollouts
from potstill.runs import run_folder
from potstill.training.loop import train
from potstill.types import Example, Prompt

WINDOW = 12
PROMPTS = [
    Prompt(example=Example(id=str(i), prompt="prompt"), token_ids=ids)
    for i, ids in enumerate([(1, 5, 6), (1, 7), (1, 9, 4, 8), (1,)] * 4)
]


def write(student, teacher, num_rounds=1, prompts=PROMPTS, **objective):
    engines = {"student": NativeEngine(student.model), "teacher": NativeEngine(teacher.model)}
    writing = Writing(
        objective=Objective(prefix="mixed", **objective),
        engines=engines,
        window=WINDOW,
        end_ids=(2,),
        sampling=Sampling(),
        rollouts_per_step=len(prompts),
    )
    rounds = range(num_rounds)
    return [
        write_rollouts(writing, prompts, [(7, r, place) for place in range(len(prompts))])
        for r in rounds
    ]


def alone(model, prompts=PROMPTS, round_=0, max_tokens=WINDOW):
    seeds = [(7, round_, place) for place in range(len(prompts))]
    ids = [prompt.token_ids for prompt in prompts]
    return sample(model.model, ids, seeds, max_tokens=max_tokens, end_ids=(2,), sampling=Sampling())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 1.0])
def test_sequences_are_the_students_in_an_exact_share(student, teacher, share):
    rounds = write(student, teacher, num_rounds=5, student_share=share)
    students = [
        sum(set(rollout.writers) == {"student"} for rollout in rollouts) for rollouts in rounds
    ]
    if share * 16 == int(share * 16):
        assert set(students) == {share * 16}
    assert sum(students) == round(share * 16 * 5)
    own = {"student": alone(student), "teacher": alone(teacher)}
    for place, rollout in enumerate(rounds[0]):
        (writer,) = set(rollout.writers)
        assert (
            rollout.completion_ids == own[writer][place].token_ids
            and rollout.stop == own[writer][place].stop
        )
    assert write(student, teacher, student_share=share)[0] == rounds[0]


def test_places_do_not_favour_anyone():
    counts = Counter(place for round_ in range(400) for place in student_places(8, 0.5, 0, round_))
    assert all(150 < counts[place] < 250 for place in range(8))


@pytest.mark.parametrize("first", ["teacher", "student"])
def test_a_handoff_continues_what_the_first_wrote(student, teacher, first):
    (rollouts,) = write(
        student, teacher, prefix_mix="handoff", first_writer=first, handoff_tokens=(2, 5)
    )
    second = "student" if first == "teacher" else "teacher"
    begun = alone(teacher if first == "teacher" else student)
    lengths = set()
    for rollout, own in zip(rollouts, begun, strict=True):
        m = rollout.writers.count(first)
        assert rollout.writers == (first,) * m + (second,) * (len(rollout.writers) - m)
        assert rollout.completion_ids[:m] == own.token_ids[:m]
        assert 1 <= m <= 5 and len(rollout.completion_ids) <= WINDOW
        ended = rollout.completion_ids[-1] == 2
        assert rollout.stop == ("end" if ended else "length") and (
            ended or len(rollout.completion_ids) == WINDOW
        )
        lengths.add(m if second in rollout.writers else None)
    assert lengths >= {2, 3, 4, 5}


def test_each_row_has_its_own_cap(student):
    whole = alone(student)
    caps = [1 + i % 6 for i in range(16)]
    for cap, capped, own in zip(caps, alone(student, max_tokens=caps), whole, strict=True):
        assert capped.token_ids == own.token_ids[:cap]
        assert capped.stop == ("end" if capped.token_ids[-1] == 2 else "length")


def test_tokens_are_drawn_from_the_mixture(student, teacher):
    """Against the mixture of the two models' probabilities: the first token and, after the
    likeliest, the second."""
    num, share = 6000, 0.3
    prompts = [PROMPTS[0]] * num
    (rollouts,) = write(student, teacher, prompts=prompts, prefix_mix="token", student_share=share)
    ids = torch.tensor([PROMPTS[0].token_ids])
    ((likeliest, _),) = Counter(
        r.completion_ids[0] for r in rollouts if len(r.completion_ids) > 1
    ).most_common(1)
    for prefix in ((), (likeliest,)):
        n = len(prefix)
        here = [r for r in rollouts if r.completion_ids[:n] == prefix and len(r.completion_ids) > n]
        both = torch.cat([ids, torch.tensor([prefix], dtype=torch.long)], 1)
        q, p = (m.model(input_ids=both).logits[0, -1].softmax(-1) for m in (student, teacher))
        counts = Counter(r.completion_ids[n] for r in here)
        drawn = torch.tensor([counts[i] for i in range(23)], dtype=torch.float64) / len(here)
        mixture = (share * q + (1 - share) * p).double()
        error = (mixture * (1 - mixture) / len(here)).sqrt()
        assert ((drawn - mixture).abs() < 4.5 * error + 1e-9).all()
        # Neither model alone would do.
        assert ((drawn - p).abs() > 4.5 * error).any() and ((drawn - q).abs() > 4.5 * error).any()
        of_student = sum(r.writers[n] == "student" for r in here) / len(here)
        assert abs(of_student - share) < 4.5 * (share * (1 - share) / len(here)) ** 0.5


def test_a_mixture_of_one_is_that_one(student, teacher):
    for share, model in ((0.0, teacher), (1.0, student)):
        (rollouts,) = write(student, teacher, prefix_mix="token", student_share=share)
        assert [r.completion_ids for r in rollouts] == [c.token_ids for c in alone(model)]


@pytest.mark.parametrize(
    "objective",
    [
        {"prefix_mix": "sequence", "student_share": 0.25},
        {"prefix_mix": "handoff", "handoff_tokens": [2, 9]},
        {"prefix_mix": "token", "student_share": 0.6},
    ],
    ids=["sequence", "handoff", "token"],
)
def test_training_splits_every_metric_by_writer(tmp_path, objective):
    recipe = tiny_recipe(
        tmp_path / "run", objective={"prefix": "mixed", "kl": "reverse"} | objective
    )
    train(recipe, quiet=True)
    for row in run_folder.read_rows(tmp_path / "run/metrics.jsonl"):
        parts = row["by_writer"]
        counts = {writer: part["num_loss_tokens"] for writer, part in parts.items()}
        assert sum(counts.values()) == row["num_loss_tokens"] and min(counts.values()) > 0
        assert row["student_share"] == pytest.approx(counts["student"] / row["num_loss_tokens"])
        for name in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"):
            whole = (
                sum(counts[writer] * parts[writer][name] for writer in counts)
                / row["num_loss_tokens"]
            )
            assert whole == pytest.approx(row[name], rel=1e-6)
        # The shipped student answers within the window now and then; what comes after the answer
        # does not count.
        before = [part["student_entropy_before_answer"] for part in parts.values()]
        assert min(before) <= row["student_entropy_before_answer"] <= max(before)
    (first, *_) = run_folder.read_rows(tmp_path / "run/samples.jsonl")
    assert sum(num for _, num in first["writers"]) == len(first["tokens"])


def test_rollouts_are_used_again_and_survive_a_resume(tmp_path):
    def recipe(name):
        sections = {"objective": {"prefix": "student", "kl": "reverse"}, "rollouts": {"reuse": 3}}
        return tiny_recipe(tmp_path / name, train={"steps": 7, "checkpoint_every": 2}, **sections)

    whole = train(recipe("whole"), quiet=True)
    rows = run_folder.read_rows(tmp_path / "whole/metrics.jsonl")
    assert [row["rollout_age"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert len({row["length"] for row in rows[:3]}) == 1 and rows[0]["loss"] != rows[1]["loss"]

    # After checkpoints in the middle of a round and at its end.
    for stop_at in (2, 4, 6):
        with interrupted_at(stop_at):
            train(recipe("stopped"), quiet=True)
    resumed = train(recipe("stopped"), quiet=True)
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"prefix": "student", "prefix_mix": "token"}, "prefix_mix is set but not read"),
        (
            {"prefix": "mixed", "prefix_mix": "handoff", "student_share": 0.2},
            "student_share is set but not read",
        ),
        ({"prefix": "mixed", "handoff_tokens": [1, 2]}, "handoff_tokens is set but not read"),
        (
            {"prefix": "mixed", "prefix_mix": "handoff", "handoff_tokens": [9, 3]},
            r"handoff_tokens is \[9, 3\]",
        ),
        (
            {"prefix": "mixed", "prefix_mix": "handoff", "handoff_tokens": [1, 128]},
            "below window.tokens = 128",
        ),
        ({"prefix": "mixed", "signal": "labels"}, "zero expected gradient"),
        ({"prefix": "mixed", "student_share": 1.5}, "student_share is 1.5"),
    ],
)
def test_recipes_that_make_no_sense(objective, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe({"objective": objective})
