"""A task of the user's own: what it gives is used and recorded, and whatever is wrong with it is
one line."""

import hashlib
import json
from pathlib import Path

import pytest
from commands import OPD, contents, refused, train

from potstill.cli.app import main
from potstill.runs.run_folder import read_json, read_rows
from potstill.tasks import TASKS, make_task
from potstill.tasks.own import OwnTask
from potstill.types import Example

# Sums below ten times a digit, in the embedded task's alphabet.
TASK = """
import random
from dataclasses import dataclass
from potstill.answers.grading import Grade
from potstill.types import Example

@dataclass
class Sums:
    largest: int = 9

    def examples(self, split, num_examples, seed):
        r = random.Random(f"{split}/{seed}")
        pairs = [(r.randrange(10, 100), r.randint(2, self.largest)) for _ in range(num_examples)]
        return [Example(id=f"{split}-{i}", prompt=f"__{a}*{b}=", answer=str(a * b))
                for i, (a, b) in enumerate(pairs)]

    def grade(self, examples, responses):
        return [Grade(float("#" + e.answer in r), r or None)
                for e, r in zip(examples, responses, strict=True)]

    def answer_end(self, response):
        end = response.find(".")
        return end + 1 if end >= 0 else None
"""
OWN = OPD | {"data.source": "sums.py:Sums", "evaluation.source": "sums.py:Sums"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with the task in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.py").write_text(TASK)
    return tmp_path


def edit(old: str, new: str) -> None:
    """Replace a part of the task's file."""
    text = Path("sums.py").read_text()
    assert old in text
    Path("sums.py").write_text(text.replace(old, new))


def digest() -> str:
    return hashlib.sha256(Path("sums.py").read_bytes()).hexdigest()


def test_every_task_has_the_protocol(folder):
    """Ours and the user's: problems by seed and split, one grade a response, an end within the
    response."""
    for source in ("multiplication", "columns", "reasoning-gym:leg_counting", "sums.py:Sums"):
        task = make_task(source)
        examples = task.examples("train", 3, 0)
        assert examples == make_task(source).examples("train", 3, 0) != task.examples("train", 3, 1)
        assert all(isinstance(example, Example) for example in examples)
        grades = task.grade(examples, ["", "a", "#"])
        assert [0 <= grade.score <= 1 for grade in grades] == [True] * 3
        assert task.answer_end("") is None
    assert "sums.py" not in TASKS


def test_a_run_with_an_own_task(folder, capsys):
    """Prompts, ends and scores are the file's; the run says that code is run, and records which."""
    main(train(OWN))
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "is run" in line]
    assert lines[0] == f"the code of sums.py is run (SHA-256 {digest()[:16]}...)"
    assert said.err.index(lines[0]) < said.err.index("step ")
    assert read_json(Path("run/environment.json"))["task_files"] == {"sums.py": digest()}
    rows = read_rows(Path("run/evals.jsonl"))
    assert {row["settings"]["source_sha256"] for row in rows} == {digest()}
    (responses, *_) = (read_rows(file) for file in sorted(Path("run/responses").glob("*.jsonl")))
    answers = {
        example.id: example.answer for example in make_task("sums.py:Sums").examples("test", 2, 0)
    }
    for row in responses:
        assert (
            row["score"] == float(f"#{answers[row['problem']]}" in row["text"])
            and row["answer"] == row["text"]
        )
    main(["report", "run"])
    assert not list(Path().rglob("__pycache__"))


def test_the_code_of_an_evaluation_is_part_of_what_it_is(folder, capsys):
    """Another grader scores anew, also where responses are stored; the one from before finds its
    own again."""
    command = (
        "evaluate potstill:base --source sums.py:Sums --num-problems 2 --num-responses 2 "
        "--temperatures 1"
    )
    command += " --max-tokens 8 --responses responses --out evaluation.json"
    main(command.split())
    edit('float("#" + e.answer in r)', "1.0")
    main(command.split())
    (row,) = json.loads(Path("evaluation.json").read_text())
    assert row["avg"][0] == 1 and row["settings"]["source_sha256"] == digest()
    assert len(list(Path("responses").glob("sums.py-Sums-*.jsonl"))) == 2


def test_a_resume_with_another_file(folder, capsys):
    """Scores may change and are noted; other prompts are another run. A finished run stays as it
    is."""
    first = digest()
    edit("class Sums:", "class Sums:  # with a bug\n    num = 0\n")
    edit(
        "        return [Grade(",
        "        Sums.num += 1\n        if Sums.num > 1: raise OSError(28, 'full')\n        "
        "return [Grade(",
    )
    with pytest.raises(SystemExit):
        main(train(OWN))
    assert "sums.py: Sums.grade: line 21 raised OSError: [Errno 28] full" in capsys.readouterr().err
    broken = digest()
    Path("sums.py").write_text(TASK)
    main(train(OWN))
    error = capsys.readouterr().err
    assert "resumed after step 6" in error
    assert (
        f"sums.py has changed since the run began (SHA-256 {broken[:16]}..., now {first[:16]}...)"
        in error
    )
    environment = read_json(Path("run/environment.json"))
    assert environment["task_files"] == {"sums.py": first}
    (change,) = environment["changes"]
    assert change == {"num_steps": 6, "fields": {}, "task_files": {"sums.py": [broken, first]}}

    before = contents(Path("run"))
    edit("class Sums", "# A comment.\nclass Sums")
    main(train(OWN))
    assert "sums.py has changed since; the finished run stays as it is" in capsys.readouterr().err
    Path("sums.py").unlink()
    main(train(OWN))
    assert contents(Path("run")) == before


def test_other_prompts_are_another_run(folder, capsys):
    main(train(OWN, {"evaluation.source": "multiplication"}))
    Path("run/DONE").unlink()
    edit("largest: int = 9", "largest: int = 8")
    with pytest.raises(SystemExit):
        main(train(OWN, {"evaluation.source": "multiplication"}))
    assert "was begun with other prompts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["multiplication.py", "torch.py"])
def test_only_the_named_file_is_run(folder, capsys, name):
    """Neither what has a task's name, nor files beside the named one."""
    Path(name).write_text("raise SystemExit('run')")
    Path("potstill.py").write_text("raise SystemExit('run')")
    main(train(OWN, {"data.source": "multiplication"}, {"train.steps": "1"}))
    capsys.readouterr()
    edit("import random", "import random\nimport helper_beside")
    Path("helper_beside.py").write_text("")
    refused(
        capsys,
        train(OWN, {"out": "other"}),
        "line 3 raised ModuleNotFoundError: No module named 'helper_beside'",
    )


def test_nothing_is_run_without_need(folder, capsys):
    """A dry run of a recipe or a study, a report and the list of a study's runs run no code of the
    user's."""
    Path("sums.py").write_text("raise SystemExit('run')")
    main([*train(OWN), "--dry-run"])
    Path("study.toml").write_text(STUDY)
    main(["study", "study.toml", "--dry-run"])
    assert sorted(path.name for path in Path().iterdir()) == ["study.toml", "sums.py"]


STUDY = """
out = "study"
[fields]
data.source = "sums.py:Sums"
data.num_prompts = 8
evaluation.source = "sums.py:Sums"
evaluation.num_problems = 2
evaluation.num_responses = 2
evaluation.max_tokens = 8
evaluation.temperatures = [1.0]
train = {steps = 1, prompts_per_step = 2, warmup_steps = 0}
window.tokens = 8
[[panels]]
title = "a"
models = ["potstill:base"]
[[panels.groups]]
axes.method = ["opd", "sft"]
"""


@pytest.mark.slow
def test_a_study_with_an_own_task(folder, capfd):
    """The children run the file; a file that changed since is said, and what is done stays."""
    Path("study.toml").write_text(STUDY)
    main(["study", "study.toml", "--jobs", "2"])
    environments = [read_json(file) for file in Path("study").rglob("environment.json")]
    assert [each["task_files"] for each in environments] == [{"sums.py": digest()}] * 2
    assert (Path("study") / "report.html").is_file()
    capfd.readouterr()
    edit("class Sums", "# A comment.\nclass Sums")
    main(["study", "study.toml", "--dry-run"])
    assert (
        "sums.py has changed since 3 finished runs and evaluations began; they stay"
        in capfd.readouterr().out
    )


def test_a_study_whose_file_is_wrong_begins_nothing(folder, capsys):
    Path("study.toml").write_text(STUDY)
    edit("def grade", "def score")
    refused(capsys, ["study", "study.toml", "--jobs", "1"], "sums.py: Sums has no method 'grade'")
    Path("sums.py").unlink()
    refused(capsys, ["study", "study.toml", "--dry-run"], "sums.py does not exist")


def test_a_cache_of_an_own_task(folder):
    from commands import SFT, cache

    of_task = {"data.source": "sums.py:Sums"}
    main(cache(of_task))
    main(train(OWN, SFT, {"teacher.cache": "cache"}))
    assert Path("run/DONE").is_file()


SOURCES = [
    ("none.py:Sums", "none.py does not exist; give a Python file of yours"),
    ("sums.py", "'sums.py' names no class; write it after the file, as in sums.py:MyTask"),
    ("sums.py:", "names no class"),
    ("sums.py:Sums:9", "names no class"),
    ("sums.py:Sum", "sums.py has no class 'Sum'; choose one of Sums"),
    ("sums.py:random", "sums.py has no class 'random'"),
    ("folder.py:Sums", "folder.py is a folder"),
]


@pytest.mark.parametrize(("source", "message"), SOURCES)
def test_bad_names(folder, capsys, source, message):
    Path("folder.py").mkdir()
    refused(capsys, train(OWN, {"data.source": source}), f"data source {source!r}: ", message)
    refused(
        capsys,
        ["evaluate", "potstill:base", "--source", source],
        f"evaluation source {source!r}: ",
        message,
    )


# A part of the file, what stands in its place, and the message.
FAULTS = [
    ("import random", "import random,", "sums.py, line 2 is no Python"),
    ("import random", "\0", "is no Python"),
    (
        "import random",
        "import nothing_of_this_name",
        "sums.py cannot be run: line 2 raised ModuleNotFoundError",
    ),
    (
        "import random",
        "import random\nraise SystemExit",
        "sums.py cannot be run: line 3 raised SystemExit; mend",
    ),
    ("largest: int = 9", "largest: int", "sums.py: Sums() cannot be made: it raised TypeError"),
    (
        "def examples",
        "def problems",
        "Sums has no method 'examples'; a task has examples, grade, answer_end",
    ),
    ("def grade", "grade = 3\n    def score", "Sums has no method 'grade'"),
    ("def answer_end", "def end", "Sums has no method 'answer_end'"),
    (
        "r = random",
        "r = 1 / 0 or random",
        "Sums.examples: line 12 raised ZeroDivisionError: division by zero; mend the file",
    ),
    ("return [Example", "yield [Example", "returned <generator object Sums.examples"),
    (
        "return [Example",
        "return None; [Example",
        "Sums.examples returned None; return a list of potstill.Example",
    ),
    (
        "range(num_examples)",
        "range(7)",
        "Sums.examples returned 7 examples where 24 were asked for",
    ),
    ("Example(id=f", "str(id=f", "Sums.examples: line 14 raised TypeError"),
    (
        "Example(id=f",
        "(lambda id, **k: (id, k['prompt']))(id=f",
        "returned examples[0], ('train-0', '__",
    ),
    ('Example(id=f"{split}-{i}"', "Example(id=i", "whose id is 0 and level ''; both are texts"),
    ("str(a * b)", "a * b", "it is a text or None"),
    (
        'f"__{a}*{b}="',
        '""',
        "whose prompt is ''; it is a text or a list of messages, and not empty",
    ),
    ('f"__{a}*{b}="', '[{"content": "a"}]', "whose prompt is [{'content': 'a'}]"),
    ("answer=", "completion='a', answer=", "whose completion is 'a'"),
    ("answer=", "teacher_prompt=3, answer=", "whose teacher_prompt is 3"),
    (
        "return end + 1 if end >= 0 else None",
        "return 0.5",
        "Sums.answer_end returned 0.5; return None, or a number",
    ),
    (
        "return end + 1 if end >= 0 else None",
        "return 1",
        "Sums.answer_end returned 1; return None, or a number",
    ),
    (
        "end = response.find",
        "end = response.fnd",
        "line 22 raised AttributeError: 'str' object has no attribute 'fnd'",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), FAULTS)
def test_faults_of_examples(folder, capsys, old, new, message):
    edit(old, new)
    refused(capsys, train(OWN), "data source 'sums.py:Sums': ", message)


GRADES = [
    ("[Grade(", "[float(", "line 18 raised"),
    (
        '[Grade(float("#" + e.answer in r), r or None)',
        "[0.5",
        "Sums.grade returned 0.5; return a potstill.Grade",
    ),
    (
        "[Grade(",
        "[][:1] and [Grade(",
        "Sums.grade returned []; return a list of 1 potstill.Grade, one a response",
    ),
    (
        "return [Grade(",
        "return 3; [Grade(",
        "Sums.grade returned 3; return a list of 1 potstill.Grade",
    ),
    (
        'float("#" + e.answer in r)',
        "2",
        "returned Grade(score=2, answer=None, note=''); return a score from 0 to 1",
    ),
    ('float("#" + e.answer in r)', "float('nan')", "return a score from 0 to 1"),
    ('float("#" + e.answer in r)', "'1'", "return a score from 0 to 1"),
    ("r or None", "3", "return a score from 0 to 1, and texts or None for the rest"),
    (
        "e.answer in r",
        "e.anwser in r",
        "Sums.grade: line 18 raised AttributeError: 'Example' object has no attribute",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), GRADES)
def test_faults_of_grades_are_found_before_a_training(folder, capsys, old, new, message):
    edit(old, new)
    refused(capsys, train(OWN), "evaluation source 'sums.py:Sums': ", message)


def test_lists_hold_no_tasks(folder, capsys):
    refused(
        capsys,
        [*train(OPD), "--data.source", "sums.py:Sums", "multiplication"],
        "has the task 'sums.py:Sums' among its tables",
    )


def test_doubled_ids_and_lists_are_put_right(folder):
    """Ids are told apart by their places, and lists of messages are kept as tuples, as examples are
    never changed."""
    edit(
        'Example(id=f"{split}-{i}", prompt=f"__{a}*{b}="',
        'Example(id="p", prompt=[{"role": "user", "content": str(a)}]',
    )
    examples = OwnTask("sums.py:Sums").examples("train", 2, 0)
    assert [example.id for example in examples] == ["0:p", "1:p"]
    assert all(isinstance(example.prompt, tuple) for example in examples)
