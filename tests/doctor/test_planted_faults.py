"""Planted faults: each is found by the check that is for it, and a clean set-up has none.

A fault is a change to a clean chat pair, or to its recipe, prompts or machine. Most are made after
the models were probed, as no probe may hide them from a check.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model, make_rollout, tiny_recipe
from planted import (
    MESSAGES,
    NotFinite,
    Rescaled,
    Shifted,
    chat_model,
    chat_recipe,
    chat_tokenizer,
    faulty,
    tilt,
)

from potstill.checks import resources, settings
from potstill.checks.finding import Written
from potstill.checks.models import loss_tokens
from potstill.checks.run import faults_at_start, guarded
from potstill.cli.app import main
from potstill.doctor.examine import Report, examine
from potstill.models import distributed
from potstill.runs.run_folder import RunError
from potstill.training.opening import subject_of
from potstill.training.setup import prepare
from potstill.types import DataError, ModelError

GOOD = ("ok", "skipped")
TASK = """
from potstill import Example, Grade
class Task:
    def examples(self, split, num_examples, seed):
        return [Example(id=str(i), prompt=f"What is {i} + 1?", answer=str(ANSWER))
                for i in range(num_examples)]
    def grade(self, examples, responses):
        return [Grade(float(GRADE)) for e, r in zip(examples, responses)]
    def answer_end(self, response):
        return None
"""


def pair(**more: Any) -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "student": chat_model(tokenizer, 0),
        "teacher": chat_model(tokenizer, 1),
        "prompts": MESSAGES,
    } | more


def task(folder, answer: str, grade: str) -> str:
    text = TASK.replace("ANSWER", answer).replace("GRADE", grade)
    (folder / "task.py").write_text(text)
    return f"{folder / 'task.py'}:Task"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted:
    """A planted fault: sections over the recipe's, objects over the clean pair's, and patches."""

    sections: dict[str, Any] = dataclasses.field(default_factory=dict)
    objects: dict[str, Any] = dataclasses.field(default_factory=dict)
    patches: tuple[tuple[Any, str, Any], ...] = ()


def teacher_of(kind) -> Callable[..., Planted]:
    return lambda folder: Planted(
        objects={"teacher": faulty(kind, chat_model(chat_tokenizer(), 1))}
    )


def another_template(folder) -> Planted:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n", "model\\n")
    return Planted(objects={"teacher": chat_model(tokenizer, 1)})


def no_template(folder) -> Planted:
    tokenizer = chat_tokenizer()
    teacher = chat_model(tokenizer, 1)
    tokenizer.chat_template = None
    return Planted(objects={"teacher": teacher})


def another_end(folder) -> Planted:
    tokenizer = chat_tokenizer()
    student = chat_model(tokenizer, 0)
    student.end_ids = (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    teacher = chat_model(tokenizer, 1)
    teacher.end_ids = (tokenizer.convert_tokens_to_ids("<|endoftext|>"),)
    return Planted(objects={"student": student, "teacher": teacher})


def another_habit(folder) -> Planted:
    """Both declare both ends, and each prefers another."""
    return Planted(
        sections={"objective": {"end_class": "raw"}},
        objects={"teacher": chat_model(chat_tokenizer(), 1, ends="<|endoftext|>")},
    )


def mass_on_padding(folder) -> Planted:
    tokenizer = chat_tokenizer()
    teacher = chat_model(tokenizer, 1, rows=8)
    tilt(teacher.model, {teacher.vocab_size - 1: 30.0})
    return Planted(objects={"teacher": teacher})


def in_bfloat16(folder) -> Planted:
    student = chat_model(chat_tokenizer(), 0)
    student.model.to(torch.bfloat16)
    return Planted(sections={"train": {"lr": 1e-6}}, objects={"student": student})


def with_dropout(folder) -> Planted:
    student = chat_model(chat_tokenizer(), 0, attention_dropout=0.9)
    return Planted(sections={"student": {"dropout": True}}, objects={"student": student})


def undecided_teacher(folder) -> Planted:
    teacher = chat_model(chat_tokenizer(), 1)
    with torch.no_grad():
        teacher.model.lm_head.weight *= 1e-3
        teacher.model.lm_head.bias *= 0
    return Planted(objects={"teacher": teacher})


def same_models(folder) -> Planted:
    return Planted(objects={"teacher": chat_model(chat_tokenizer(), 0)})


def never_ends(folder) -> Planted:
    tokenizer = chat_tokenizer()
    models = {"student": chat_model(tokenizer, 0), "teacher": chat_model(tokenizer, 1)}
    for model in models.values():
        tilt(model.model, dict.fromkeys(model.end_ids, -30.0))
    return Planted(objects=models)


def settings_of(**sections) -> Callable[..., Planted]:
    return lambda folder: Planted(sections=sections)


def verifier_of(answer: str, grade: str) -> Callable[..., Planted]:
    return lambda folder: Planted(
        sections={"evaluation": {"source": task(folder, answer, grade), "num_problems": 8}}
    )


def patched(place, name: str, value) -> Callable[..., Planted]:
    return lambda folder: Planted(patches=((place, name, value),))


def long_answers(folder) -> Planted:
    rows = [{"prompt": m, "completion": "one file " * 40} for m in MESSAGES]
    prefix = {"objective": {"prefix": "dataset", "kl": "forward"}, "window": {"tokens": 8}}
    return Planted(sections=prefix, objects={"prompts": rows})


NO_DISK = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1000))
# The fault, the check that finds it, and how grave it is.
FAULTS = {
    "the teacher's states are shifted": (teacher_of(Shifted), "alignment", "error"),
    "the teacher's logits are scaled": (teacher_of(Rescaled), "head", "error"),
    "the teacher's states are NaN": (teacher_of(NotFinite), "start", "error"),
    "the teacher's template is another": (another_template, "templates", "warning"),
    "the teacher has no template": (no_template, "templates", "warning"),
    "the teacher is undecided": (undecided_teacher, "start", "error"),
    "the teacher is the student": (same_models, "start", "warning"),
    "other end tokens": (another_end, "ends", "warning"),
    "other end habits": (another_habit, "end masses", "error"),
    "probability on padding": (mass_on_padding, "vocabulary", "warning"),
    "bfloat16 with a small rate": (in_bfloat16, "updates", "warning"),
    "dropout": (with_dropout, "self KL", "warning"),
    "a window below every answer": (never_ends, "window", "warning"),
    "completions beyond the window": (long_answers, "data and window", "warning"),
    "a verifier that accepts all": (verifier_of("i + 1", "True"), "verifier", "error"),
    "a verifier that accepts nothing": (verifier_of("i + 1", "False"), "verifier", "error"),
    "wrong answers": (
        verifier_of("i + 2", "r == str(int(e.prompt.split()[2]) + 1)"),
        "verifier",
        "error",
    ),
    "a toy's rate for a real model": (
        lambda folder: Planted(
            sections={"train": {"lr": 3e-3}}, patches=((settings, "FEW_WEIGHTS", 0),)
        ),
        "learning rate",
        "warning",
    ),
    "no memory": (patched(resources, "free_memory", lambda device: 1000), "memory", "error"),
    "no disk": (patched(resources, "shutil", NO_DISK), "disk", "error"),
}
# Left to the slow tests.
SLOW = (
    "the teacher has no template",
    "the teacher is undecided",
    "the teacher is the student",
    "bfloat16 with a small rate",
    "completions beyond the window",
    "a verifier that accepts nothing",
    "wrong answers",
    "a toy's rate for a real model",
    "no memory",
)
# Faults that a run refuses, and so does an examination.
REFUSED = {
    "a NaN in the weights": (ModelError, "the weights are not finite"),
    "other tokenizers": (ModelError, "differ at"),
    "no room for the answer": (DataError, "more than the context"),
    "a folder of something else": (RunError, "holds no run"),
}


def report_of(folder, planted: Planted) -> Report:
    recipe = chat_recipe(folder / "run", **planted.sections)
    with pytest.MonkeyPatch.context() as patch:
        for place, name, value in planted.patches:
            patch.setattr(place, name, value)
        return examine(recipe, **pair(**planted.objects))


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=pytest.mark.slow if f in SLOW else ()) for f in FAULTS]
)
def test_each_fault_is_found_by_its_check(fault, tmp_path):
    make, check, level = FAULTS[fault]
    report = report_of(tmp_path, make(tmp_path))
    (found,) = [finding for finding in report.findings if finding.check == check]
    assert found.level == level, found
    assert found.fix
    assert report.is_fit == (level == "warning")
    assert not (tmp_path / "run").exists()


def test_a_clean_chat_pair_has_no_fault(tmp_path):
    report = report_of(tmp_path, Planted())
    assert [f for f in report.findings if f.level not in GOOD] == []
    assert report.verdict.startswith("no fault found in 17 checks")
    json.dumps(report.as_data())


def test_padding_without_probability_is_no_fault(tmp_path):
    """A head with more rows than the other, which no token has."""
    teacher = chat_model(chat_tokenizer(), 1, rows=8)
    tilt(teacher.model, dict.fromkeys(range(teacher.vocab_size - 8, teacher.vocab_size), -30.0))
    report = report_of(tmp_path, Planted(objects={"teacher": teacher}))
    assert {f.check: f.level for f in report.findings}["vocabulary"] == "ok"


def test_the_shipped_pair_has_no_fault_on_the_command_line(tmp_path, capsys, monkeypatch):
    """And what is printed: JSON alone on standard output, and lines of progress elsewhere."""
    monkeypatch.chdir(tmp_path)
    fields = {"window.tokens": 96, "train.prompts-per-step": 8, "data.num-prompts": 64}
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    main(["doctor", "demo", *words, "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert [f for f in report["findings"] if f["level"] not in GOOD] == []
    assert (report["fit"], report["method"]) == (True, "OPD")
    assert set(report) == {"method", "out", "fit", "verdict", "seconds", "findings"}
    assert {tuple(finding) for finding in report["findings"]} == {
        ("check", "level", "says", "fix", "measured")
    }
    assert "loading models and prompts" in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_shipped_pair_has_no_fault_on_teacher_prefixes(tmp_path):
    recipe = tiny_recipe(
        tmp_path / "run",
        window={"tokens": 96},
        evaluation={"source": "multiplication", "num_problems": 8},
    )
    report = examine(recipe)
    assert [f for f in report.findings if f.level not in GOOD] == []


def test_a_reward_is_examined_without_a_teacher(tmp_path):
    report = examine(
        tiny_recipe(
            tmp_path / "run",
            objective={"prefix": "student", "kl": "none"},
            reward={"weight": 1, "group_size": 4, "start_kl": 0.1},
            train={"prompts_per_step": 2},
        )
    )
    levels = {finding.check: finding.level for finding in report.findings}
    assert levels["speed"] == levels["verifier"] == "ok" and "failed" not in levels.values()


def test_the_table_fits_and_an_error_exits_with_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resources, "shutil", NO_DISK)
    fields = ["--window.tokens", "16", "--train.prompts_per_step", "4", "--data.num_prompts", "8"]
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "demo", *fields, "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1
    assert max(map(len, lines)) <= 100
    assert any("-> free some space" in line for line in lines)
    assert re.match(r"1 error(, \d warnings?)? in 17 checks, .*: mend the errors", lines[-1])


def test_a_run_says_at_its_start_what_is_wrong_and_no_more(tmp_path):
    recipe, world = chat_recipe(tmp_path / "run"), distributed.start()
    clean = subject_of(recipe, prepare(recipe, world, **pair()), world)
    assert faults_at_start(clean) == []
    objects = pair(**another_template(tmp_path).objects)
    other = subject_of(recipe, prepare(recipe, world, **objects), world)
    (line,) = faults_at_start(other)
    assert line.startswith("warning: templates: the teacher reads ")
    assert line.endswith('set teacher.template = "chat", or choose models of one family')


@pytest.mark.parametrize("fault", REFUSED)
def test_what_a_run_refuses_is_refused(fault, tmp_path):
    error, says = REFUSED[fault]
    objects, sections = pair(), {}
    if fault == "a NaN in the weights":
        with torch.no_grad():
            objects["teacher"].model.lm_head.weight[0, 0] = float("nan")
    elif fault == "other tokenizers":
        objects["teacher"] = make_model()
    elif fault == "no room for the answer":
        sections = {"window": {"tokens": 1000}}
    else:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(error, match=says):
        examine(chat_recipe(tmp_path / "run", **sections), **objects)


def test_completions_without_loss_tokens_are_found(tmp_path):
    recipe = chat_recipe(tmp_path / "run")
    world = distributed.start()
    subject = subject_of(recipe, prepare(recipe, world, **pair()), world)
    none = make_rollout((1, 4), (5, 6, 2), trained=(False, False, False))
    words = make_rollout((1, 4), (5, 6, 2), trained=(True, True, False))
    good = make_rollout((1, 4), (5, 6, 2), trained=(False, True, True))
    levels = []
    for rollout in (none, words, good):
        written = Written(step=[rollout], student=[], teacher=[], window=32, is_whole=True)
        levels.append(loss_tokens(subject, written).level)
    assert levels == ["error", "error", "ok"]


def test_a_check_that_cannot_be_done_is_a_finding():
    def check(subject):
        raise IndexError("list index out of range")

    found = guarded("alignment", check, None)
    assert (found.check, found.level) == ("alignment", "failed")
    assert found.says == "it cannot be checked: IndexError: list index out of range"
