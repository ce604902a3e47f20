"""Teachers: a run asks of one what the protocol says, and nothing else."""

import pytest
from conftest import tiny_recipe

import potstill
from potstill.runs import run_folder
from potstill.teachers.protocol import Teacher
from potstill.training import setup

MEMBERS = [name for name in vars(Teacher) if not name.startswith("_")]


class Elsewhere:
    """A teacher that is no LanguageModel and cannot write, and has the members of the protocol
    alone."""

    def __init__(self, model, **changed):
        for name in MEMBERS:
            setattr(self, name, changed[name] if name in changed else getattr(model, name))


def rows_of(folder):
    """A run's log without what depends on the machine's speed."""
    rows = run_folder.read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


OBJECTIVES = [{"kl": "reverse"}, {"signal": "topk", "top_k": 5}, {"kl": "reverse", "gamma": 0.9}]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_teacher_of_another_kind_trains_the_same(tmp_path, monkeypatch, objective):
    objective = {"prefix": "student"} | objective
    recipes = [
        tiny_recipe(tmp_path / name, objective=objective, train={"steps": 2})
        for name in ("live", "elsewhere")
    ]
    potstill.train(recipes[0], quiet=True)
    load_teacher = setup.load_teacher
    monkeypatch.setattr(
        setup, "load_teacher", lambda *given: Elsewhere(load_teacher(*given), decoder=None)
    )
    potstill.train(recipes[1], quiet=True)
    assert rows_of(tmp_path / "elsewhere") == rows_of(tmp_path / "live")
    models = [
        run_folder.read_json(tmp_path / name / "environment.json")["models"]
        for name in ("live", "elsewhere")
    ]
    assert models[0] == models[1]


def test_the_gate_takes_a_teacher_at_its_word(tmp_path, monkeypatch):
    """One that scores nothing but what is stored is not asked about the probes; one that cannot
    write does not."""
    gate = {
        "tokens": 24,
        "schedule": "entropy-gated",
        "start": 12,
        "check_every": 1,
        "num_probes": 4,
    }
    gate["reference"] = "teacher"
    load_teacher = setup.load_teacher
    probed = {}
    for can_score in (True, False):
        made = {"can_score": can_score, "decoder": None}
        monkeypatch.setattr(
            setup, "load_teacher", lambda *given, made=made: Elsewhere(load_teacher(*given), **made)
        )
        out = tmp_path / str(can_score)
        potstill.train(
            tiny_recipe(out, objective={"prefix": "student"}, window=gate, train={"steps": 2}),
            quiet=True,
        )
        probed[can_score] = run_folder.read_rows(out / "window.jsonl")[0]
    assert probed[True]["teacher_entropy"] is not None and probed[False]["teacher_entropy"] is None
