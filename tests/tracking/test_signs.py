"""Signs of trouble: series that must and must not be warned of, each once, resumed or not."""

import random
from typing import Any

import pytest
from conftest import interrupted_at, tiny_recipe
from small_runs import FAST, rows_of

import potstill
from potstill.config import Objective
from potstill.objectives.habits import disagreement
from potstill.teachers.ends import Ends
from potstill.tracking import signs
from potstill.tracking.signs import SIGNS, Watch

HEALTHY = {
    "prefix": "student",
    "loss": 0.5,
    "student_entropy_before_answer": 0.4,
    "teacher_entropy_before_answer": 0.35,
    "truncation": 0.05,
    "zlib_ratio": 1.5,
    "grad_norm": 1.0,
    "lr": 1e-5,
    "window": 128,
}
NUM = 120


def series(seed: int = 0, spread: float = 0.15, **of_step) -> list[dict[str, Any]]:
    """Rows of a run whose loss falls by half, with noise; `of_step` are functions of how far it is,
    from 0 to 1."""
    noise = random.Random(seed)
    rows = []
    for step in range(NUM):
        at = step / (NUM - 1)
        row: dict[str, Any] = HEALTHY | {"step": step + 1, "loss": 0.5 * (1 - 0.5 * at)}
        row |= {name: function(at) for name, function in of_step.items()}
        for name in ("loss", "grad_norm", "student_entropy_before_answer", "zlib_ratio"):
            if row.get(name) is not None:
                row[name] *= 1 + spread * noise.uniform(-1, 1)
        rows.append(row)
    return rows


def seen(rows) -> set[str]:
    return Watch(SIGNS, rows).seen


def at_end(value: float, otherwise: float, share: float = 0.3):
    """A value in the last steps of a run."""
    return lambda at: value if at > 1 - share else otherwise


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_sign(seed):
    assert seen(series(seed, spread=0.4)) == set()


@pytest.mark.parametrize(
    ("name", "of_step"),
    [
        ("entropy", {"student_entropy_before_answer": lambda at: 0.4 * (1 - 0.9 * at)}),
        ("truncation", {"truncation": at_end(0.5, 0.05)}),
        ("truncation", {"truncation": lambda at: 0.6 * at}),
        ("loops", {"zlib_ratio": at_end(9.0, 1.5)}),
        ("gradient", {"grad_norm": lambda at: 20.0 if round(119 * at) in (60, 63, 65) else 1.0}),
        ("loss", {"loss": lambda at: 0.5}),
        ("loss", {"loss": lambda at: 0.5 + at}),
        ("spans", {"left_out": at_end(0.7, 0.2)}),
    ],
)
def test_trouble_is_seen(name, of_step):
    assert seen(series(**of_step)) == {name}


@pytest.mark.parametrize(
    "of_step",
    [
        # A student that was sharper than its teacher all the time, or whose teacher is certain.
        {"student_entropy_before_answer": lambda at: 0.1},
        {
            "student_entropy_before_answer": lambda at: 0.01 * (1 - 0.9 * at),
            "teacher_entropy_before_answer": lambda at: 0.01,
        },
        {"student_entropy_before_answer": lambda at: 0.4 * (1 - 0.3 * at)},
        {"teacher_entropy_before_answer": lambda at: None},
        {"left_out": lambda at: 0.3},
        # Who writes is not the student; the window shrank; all were cut at first too.
        {"truncation": at_end(0.9, 0.05), "prefix": lambda at: "teacher"},
        {"truncation": at_end(0.9, 0.05), "window": at_end(32, 128)},
        {"truncation": at_end(0.9, 0.8)},
        {"zlib_ratio": at_end(9.0, 1.5), "prefix": lambda at: "dataset"},
        # Text that grows compresses better.
        {"zlib_ratio": lambda at: 0.9 + 1.6 * at},
        # One outlier, and two: these are clipped.
        {"grad_norm": lambda at: 1000.0 if round(119 * at) in (60, 61) else 1.0},
        {"grad_norm": lambda at: 5.0 - 4.9 * at},
        # Nothing is left to learn; another loss is measured; the steps differ by more than it fell.
        {"loss": lambda at: 0.004},
        {"loss": lambda at: 0.5, "forward_weight": lambda at: at},
        {"loss": lambda at: 0.5, "reward": lambda at: at},
        {"loss": lambda at: 0.5, "window": lambda at: 100 + 100 * at},
    ],
)
def test_what_only_looks_like_trouble_is_not(of_step):
    assert seen(series(**of_step)) == set()


def test_a_loss_of_wide_spread_leaves_a_doubt():
    rows = [row | {"loss": 0.5 + (0.4 if row["step"] % 2 else -0.4)} for row in series()]
    assert seen(rows) == set()


def test_nothing_is_said_before_there_are_enough_steps():
    rows = series(loss=lambda at: 0.5 + at, truncation=at_end(1.0, 0.0, 0.95))
    assert seen(rows[: signs.SPAN - 1]) == set()
    assert "loss" not in seen(rows[: 2 * signs.LONG_SPAN - 1])
    assert "loss" in seen(rows[: 2 * signs.LONG_SPAN])


def test_each_is_said_once_and_a_resumed_run_knows(capsys):
    rows = series(loss=lambda at: 0.5, truncation=at_end(0.9, 0.0, 0.2))
    whole = Watch(SIGNS)
    said = [line for row in rows for line in whole.after(row)]
    assert len(said) == 2 and said[0].startswith("warning: after step 50: the loss has not fallen")
    for cut in (10, 49, 50, 51, 100):
        resumed = Watch(SIGNS, rows[:cut])
        later = [line for row in rows[cut:] for line in resumed.after(row)]
        assert later == [line for line in said if int(line.split()[3][:-1]) > cut]


def test_a_run_says_it_once_and_no_number_depends_on_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signs, "LONG_SPAN", 2)
    monkeypatch.setattr(signs, "LEAST_FALL", 1e9)
    train = {"steps": 8, "checkpoint_every": 2}
    recipe = tiny_recipe(tmp_path / "run", **FAST, train=train)
    with interrupted_at(7):
        potstill.train(recipe)
    assert capsys.readouterr().err.count("the loss has not fallen") == 1
    potstill.train(recipe)
    assert "the loss has not fallen" not in capsys.readouterr().err
    monkeypatch.undo()
    potstill.train(tiny_recipe(tmp_path / "alone", **FAST, train=train), quiet=True)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "alone")


@pytest.mark.parametrize(
    ("student", "teacher", "differ"),
    [
        ((0.9, 0.02), (0.01, 0.8), True),
        # The teacher would go on, and if it ended, then with the other.
        ((0.7, 0.04), (1e-5, 0.006), True),
        ((0.9, 0.02), (0.7, 0.1), False),
        # Two models that have not learnt to end: which token is likelier is chance.
        ((0.004, 0.003), (0.002, 0.005), False),
        ((0.9, 0.02), (0.002, 0.005), False),
        # The teacher ends with either.
        ((0.9, 0.02), (0.4, 0.5), False),
    ],
)
def test_end_tokens_differ_by_habit_and_not_by_chance(student, teacher, differ):
    names = ("<eos>", "<end>")
    ends = Ends(stop_ids=(0, 1), class_ids=(0, 1), all_ids=(0, 1), compared_ids=(0, 1))
    habits: Any = {
        "ends_of": Objective(prefix="student").prefix,
        "num_ends": 8,
        "student": dict(zip(names, student, strict=True)),
        "teacher": dict(zip(names, teacher, strict=True)),
    }

    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [names[i] for i in ids]

    assert (disagreement(habits, ends, Tokenizer()) is not None) == differ


@pytest.mark.slow
@pytest.mark.parametrize("method", potstill.config.METHODS)
def test_the_shipped_recipe_has_no_sign(tmp_path, capsys, method):
    corner = potstill.config.METHODS[method]
    fields = {
        "out": str(tmp_path / "run"),
        "objective.prefix": corner.prefix,
        "objective.kl": corner.kl,
        "validation.num_prompts": 0,
    }
    loaded = potstill.load_recipe("demo", fields)
    recipe = loaded.model_copy(update={"evaluation": potstill.Evaluation()})
    potstill.train(recipe)
    assert "warning: after step" not in capsys.readouterr().err
