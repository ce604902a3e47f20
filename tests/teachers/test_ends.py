"""Which ids end a text, which are one class, what a class does for any masses, and what models end
with."""

import contextlib
import copy
import itertools
import json
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_recipe
from torch.utils.flop_counter import FlopCounterMode

import potstill
from potstill.cache.build import build_cache
from potstill.config import CacheOptions, Evaluation, RecipeError, make_recipe
from potstill.evaluation import scores
from potstill.kl.fused import fused_loss
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms
from potstill.models.distributed import World
from potstill.models.language_model import ModelError, save_model
from potstill.objectives.habits import end_probs
from potstill.teachers.ends import Ends, find_ends
from potstill.teachers.manifest import CacheError
from potstill.training import setup, step

EOM, CALL = 23, 24


def ending_on(*ids, seed=0):
    """A model over the task's vocabulary and two tools' ends that declares these ends."""
    model = make_model(seed=seed, vocab_size=25)
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>", "<|call|>"]})
    model.end_ids = ids
    return model


@pytest.mark.parametrize(
    ("student", "teacher", "sections", "stops", "merged"),
    [
        # One id is no class; equal sets of two are one as different sets are.
        ((2,), (2,), {}, (2,), ()),
        ((2, 22), (2, 22), {}, (2, 22), (2, 22)),
        ((2,), (22,), {}, (2, 22), (2, 22)),
        ((2, 22), (2, 22), {"teacher": {"model": "self"}}, (2, 22), (2, 22)),
        ((2,), (22,), {"rollouts": {"end_set": "student"}}, (2,), (2, 22)),
        ((2, 22), (2, 22), {"objective": {"end_class": "raw"}}, (2, 22), ()),
        # Tools' ends stop a text and are not in the class, unless a list says otherwise.
        ((2, EOM), (22, CALL), {}, (2, EOM, 22, CALL), (2, 22)),
        ((2, EOM), (2, EOM), {}, (2, EOM), ()),
        ((2, EOM), (2, EOM), {"objective": {"separate_ends": ()}}, (2, EOM), (2, EOM)),
        ((2, EOM), (22,), {"objective": {"separate_ends": ("<eos>",)}}, (2, EOM, 22), (EOM, 22)),
        # The written token itself is learnt from labels; an id without a row has no mass.
        ((2, 22), (2, 22), {"objective": {"prefix": "teacher", "signal": "labels"}}, (2, 22), ()),
        ((2,), (22, 99), {}, (2, 22, 99), (2, 22)),
    ],
)
def test_which_ids_stop_and_which_are_one_class(student, teacher, sections, stops, merged):
    recipe = make_recipe({"objective": {"prefix": "student"}, **sections})
    found = find_ends(recipe, ending_on(*student), ending_on(*teacher), 25)
    union = tuple(dict.fromkeys(student + teacher))
    compared = tuple(i for i in union if i < 25)
    assert found == Ends(
        all_ids=union,
        stop_ids=stops,
        class_ids=merged,
        compared_ids=compared if len(compared) > 1 else (),
    )


def test_a_separate_end_that_is_none_is_refused_with_the_list(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", objective={"separate_ends": ("<|call|>",)})
    message = (
        r"separate_ends names '<\|call\|>', which is no end token .*; theirs are <eos>, "
        r"<\|eom_id\|>: name some"
    )
    with pytest.raises(RecipeError, match=message):
        potstill.train(
            recipe,
            student=ending_on(2, EOM),
            teacher=ending_on(2, seed=1),
            prompts=["1*2="],
            quiet=True,
        )
    assert not (tmp_path / "run").exists()
    for objective, reason in (
        ({"end_class": "raw"}, "raw"),
        ({"prefix": "dataset", "signal": "labels"}, "labels"),
    ):
        with pytest.raises(
            RecipeError, match=f'objective.separate_ends is set but not read: .* "{reason}"'
        ):
            make_recipe({"objective": {**objective, "separate_ends": ("<eos>",)}})


def test_a_model_without_an_end_is_refused():
    with pytest.raises(ModelError, match="names no end token"):
        find_ends(make_recipe({}), ending_on(), ending_on(), None)


def test_equal_sets_are_one_class_everywhere(tmp_path, capsys):
    """Training, its evaluation and export, reinforcement learning from there: two ids in both
    models, in one order."""
    student, teacher = ending_on(2, 22), ending_on(2, 22, seed=1)
    settings = {
        "source": "multiplication",
        "num_problems": 2,
        "num_responses": 1,
        "max_tokens": 16,
        "temperatures": (1.0,),
    }
    recipe = tiny_recipe(tmp_path / "run", train={"steps": 1}, evaluation=settings)
    result = potstill.train(recipe, student=student, teacher=teacher, prompts=["__12*3="])
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["end_ids"] == environment["end_class"] == [2, 22]
    assert "one class in the loss: <eos> (2), " in capsys.readouterr().err
    (row,) = scores.evaluate(result.folder, Evaluation.model_validate(settings), quiet=True)
    assert row["settings"]["end_ids"] == [2, 22]
    save_model(student, dict(student.model.named_parameters()), (2, 22), tmp_path / "model")
    alone = {"objective": {"prefix": "student", "kl": "none"}, "reward": {"weight": 1.0}}
    after = tiny_recipe(tmp_path / "after", student={"model": str(tmp_path / "model")}, **alone)
    assert setup.prepare(after, World(0, 1, torch.device("cpu"))).ends.stop_ids == (2, 22)


def test_a_cache_is_of_its_class(tmp_path):
    """A cache of likeliest tokens keeps the ends by the same rule, and another rule is refused."""
    models: dict[str, Any] = {"student": ending_on(2, 22), "teacher": ending_on(2, 22, seed=1)}
    models["prompts"] = ["__12*3=", "_123*4="]
    objective = {"prefix": "teacher", "signal": "topk", "top_k": 8}
    recipe = tiny_recipe("unused", objective=objective)
    manifest = build_cache(
        recipe, tmp_path / "cache", CacheOptions(payload="topk"), quiet=True, **models
    )
    assert manifest.settings.end_ids == manifest.settings.end_class == (2, 22)
    for changed, is_refused in (
        ({}, False),
        ({"end_class": "raw"}, True),
        ({"separate_ends": ("<eos>",)}, True),
    ):
        spec = {
            "objective": {**objective, **changed},
            "teacher": {"cache": str(tmp_path / "cache")},
        }
        with (
            pytest.raises(CacheError, match="the end class")
            if is_refused
            else contextlib.nullcontext()
        ):
            setup.prepare(tiny_recipe("unused", **spec), World(0, 1, torch.device("cpu")), **models)


# Logits of three members beside ordinary tokens: nothing, everything by one of them, shares, more
# than everything else.
MASSES = [
    (-300.0,) * 3,
    (30.0, -300.0, -300.0),
    (-300.0, 30.0, -300.0),
    (0.0,) * 3,
    (-300.0, 5.0, -2.0),
    (60, 60, -60),
]


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd", "skew_forward", "skew_reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
def test_members_of_any_mass(kind, dtype):
    """Value and gradient against sums of probabilities in float64, each mass of the student's with
    each teacher's."""
    ends, num_tokens = [1, 4, 7], 9
    generator = torch.Generator().manual_seed(0)
    pairs = list(itertools.product(MASSES, MASSES))
    z, y = torch.randn(2, len(pairs), num_tokens, generator=generator, dtype=torch.float64)
    for row, (mine, theirs) in enumerate(pairs):
        z[row, ends], y[row, ends] = torch.tensor(mine).double(), torch.tensor(theirs).double()

    def coarse(logits):
        probs = logits.softmax(-1)
        rest = [i for i in range(num_tokens) if i not in ends]
        return torch.cat([probs[:, rest], probs[:, ends].sum(-1, keepdim=True)], -1)

    exact_z = z.clone().requires_grad_()
    q, p = coarse(exact_z), coarse(y)
    m = 0.3 * p + 0.7 * q
    of_p, of_q = (p * (p / m).log()).sum(-1), (q * (q / m).log()).sum(-1)
    expected_N = {
        "forward": (p * (p / q).log()).sum(-1),
        "reverse": (q * (q / p).log()).sum(-1),
        "jsd": 0.3 * of_p + 0.7 * of_q,
        "skew_forward": of_p,
        "skew_reverse": of_q,
    }[kind]
    expected_N.sum().backward()

    found_z = z.to(dtype).requires_grad_()
    head = Head(torch.eye(num_tokens, dtype=dtype))
    terms = LossTerms(**{kind: 1.0}, mixture_weight=0.3)
    loss, loss_N, _ = fused_loss(found_z, head, y.to(dtype), head, terms, end_ids=ends, tile=(5, 4))
    loss.backward()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert exact_z.grad is not None and found_z.grad is not None
    scale_N = expected_N.detach().clamp(min=1)
    assert ((loss_N - expected_N.detach()).abs() / scale_N).max() < tolerance
    assert ((found_z.grad - exact_z.grad).abs() / scale_N[:, None]).max() < tolerance


def test_a_set_of_one_id_costs_nothing():
    """The same operations and the same bits as without an end set."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, 20, 6)
    weight, teacher_weight = torch.randn(2, 40, 6)
    found = []
    for ends in ((), (3,), (3, 5)):
        mine = weight.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            terms = LossTerms(forward=0.4, reverse=0.6)
            loss, *_ = fused_loss(
                hidden, Head(mine), teacher_hidden, Head(teacher_weight), terms, end_ids=ends
            )
            loss.backward()
        found.append((counter.get_total_flops(), loss.item(), mine.grad))
    without, one, two = found
    assert without[:2] == one[:2] and torch.equal(without[2], one[2])
    assert two[0] > one[0] and two[1] != one[1]


def swapped(model):
    """A model like this one whose two ends have changed places."""
    other = ending_on(*model.end_ids)
    order = list(range(25))
    order[2], order[22] = 22, 2
    head = torch.nn.Linear(16, 25, bias=False)
    with torch.no_grad():
        head.weight.copy_(model.head.weight_VD[order])
    other.model.lm_head = head
    return other


@pytest.mark.parametrize("prefix", ["student", "teacher", "mixed"])
def test_habits_are_the_models_own_probabilities(tmp_path, monkeypatch, prefix):
    """Against whole distributions of plain forward passes, one completion at a time."""
    written = []
    real = step.write_rollouts
    monkeypatch.setattr(
        step, "write_rollouts", lambda *given: written.append(real(*given)) or written[-1]
    )
    objective = {"prefix": prefix, "temperature": 1.3}
    recipe = tiny_recipe(
        tmp_path / "run", objective=objective, train={"steps": 1, "prompts_per_step": 32}
    )
    student, teacher = ending_on(2), ending_on(22, seed=1)
    result = potstill.train(
        recipe, student=student, teacher=teacher, prompts=["__12*3="], quiet=True
    )
    writer = "teacher" if prefix == "teacher" else "student"
    ended = [r for r in written[0] if r.completion_ids[-1] in (2, 22) and r.writers[-1] == writer]
    habits = result.metrics["end_habits"]
    assert habits["ends_of"] == writer and habits["num_ends"] == len(ended) > 0
    for who, model in (("student", ending_on(2)), ("teacher", teacher)):
        with torch.no_grad():
            rows = [
                model.model(
                    input_ids=torch.tensor([[*r.prompt.token_ids, *r.completion_ids[:-1]]])
                ).logits[0, -1]
                for r in ended
            ]
        expected = (torch.stack(rows) / 1.3).softmax(-1).mean(0)
        assert list(habits[who].values()) == pytest.approx(
            [expected[2].item(), expected[22].item()], rel=1e-4
        )


def test_habits_of_every_kind_of_head():
    torch.manual_seed(0)
    hidden = torch.randn(5, 6, dtype=torch.float64)
    weight, bias = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    head = Head(weight, bias_V=bias, scale=0.7, softcap=2.0)
    logits = head(hidden, 20) / 0.8
    probs = end_probs(hidden, head, (3, 17), logits.logsumexp(-1), 0.8)
    torch.testing.assert_close(probs, logits.softmax(-1)[:, [3, 17]])


@pytest.mark.parametrize(
    ("objective", "teacher_is_swapped", "message"),
    [
        ({}, False, None),
        ({}, True, "they are one class in the loss"),
        ({"end_class": "raw"}, True, "the loss keeps them apart"),
        ({"separate_ends": ["<eos>"]}, True, "the loss keeps them apart"),
    ],
)
def test_other_habits_are_warned_of_once(tmp_path, capsys, objective, teacher_is_swapped, message):
    student = ending_on(2, 22)
    with torch.no_grad():
        # The student ends with <eos> far more often than with the other.
        weight = student.head.weight_VD.clone()
        weight[2] += 0.5 * weight[2].sign()
        head = torch.nn.Linear(16, 25, bias=False)
        head.weight.copy_(weight)
        student.model.lm_head = head
    teacher = swapped(student) if teacher_is_swapped else copy.deepcopy(student)
    recipe = tiny_recipe(
        tmp_path / "run", objective={"prefix": "student", **objective}, train={"lr": 1e-6}
    )
    result = potstill.train(
        recipe, student=student, teacher=teacher, prompts=["__12*3=", "_123*4="]
    )
    warnings = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "the student would end with" in line
    ]
    assert len(warnings) == (message is not None)
    assert message is None or (message in warnings[0] and "would end with <eos> (" in warnings[0])
    habits = result.metrics["end_habits"]
    mine, theirs = habits["student"].values(), habits["teacher"].values()
    assert list(mine) == pytest.approx(
        list(theirs)[::-1] if teacher_is_swapped else list(theirs), rel=1e-2
    )


@pytest.mark.parametrize(
    ("objective", "is_known", "line"),
    [
        (
            {"signal": "topk"},
            False,
            'is not known: with objective.signal = "topk" only its likeliest',
        ),
        ({"signal": "sampled", "kl": "reverse"}, True, None),
    ],
)
def test_a_teacher_that_says_little_has_no_habits(tmp_path, capsys, objective, is_known, line):
    recipe = tiny_recipe(
        tmp_path / "run", objective={"prefix": "student", **objective}, train={"steps": 1}
    )
    models: dict[str, Any] = {"student": ending_on(2, 22), "teacher": ending_on(2, seed=1)}
    habits = potstill.train(recipe, prompts=["__12*3="], **models).metrics["end_habits"]
    assert ("teacher" in habits) == is_known and sum(habits["student"].values()) > 0
    assert (line or "nothing") in capsys.readouterr().err + "nothing"


def test_one_end_has_no_habits_to_log(tmp_path):
    assert (
        "end_habits"
        not in potstill.train(tiny_recipe(tmp_path / "run", train={"steps": 1}), quiet=True).metrics
    )
