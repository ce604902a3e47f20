"""The mathematics benchmarks from local files in exactly the hub's schemas, and clear errors
without the network."""

import json

import pytest
from conftest import make_model

from potstill.cli.app import main
from potstill.config import Evaluation
from potstill.evaluation.scores import evaluate, make_problems
from potstill.tasks import make_task
from potstill.tasks.benchmarks import BOX_INSTRUCTION
from potstill.types import DataError

# As the hub's data sets have them.
ROWS = {
    "gsm8k": {
        "question": "Natalia sold clips to 48 of her friends in April, and then half as many in "
        "May. How many in all?",
        "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = "
        "<<48+24=72>>72.\n#### 72",
    },
    "math500": {
        "problem": "Convert the point $(0,3)$ to polar coordinates.",
        "solution": "We have $r = 3$ and $\\theta = \\pi/2$: $\\boxed{\\left( 3, \\frac{\\pi}{2} "
        "\\right)}.$",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    },
    "amc23": {
        "id": 0,
        "question": "How many minutes?",
        "answer": 27.0,
        "url": "https://example.org",
    },
    "aime24": {
        "id": 60,
        "problem": "Find the time.",
        "solution": "It is \\boxed{204}.",
        "answer": "204",
        "url": "https://example.org",
        "year": "2024",
    },
    "deepscaler": {"problem": "What is $2 + 3$?", "answer": "5", "solution": "It is 5."},
}
# (response, score) of each.
RESPONSES = {
    "gsm8k": [
        ("so \\boxed{72}", 1),
        ("\\boxed{72.0}", 1),
        ("72", 0),
        ("\\boxed{24}, \\boxed{72}", 1),
        ("\\boxed{73}", 0),
    ],
    "math500": [
        ("\\boxed{(3, \\pi/2)}", 1),
        ("\\boxed{(3, \\frac{\\pi}{3})}", 0),
        ("\\boxed{3}", 0),
    ],
    "amc23": [("\\boxed{27}", 1), ("\\boxed{27.0}", 1), ("\\boxed{28}", 0)],
    "aime24": [("\\boxed{204}", 1), ("\\boxed{0204}", 1), ("\\boxed{204.5}", 0), ("it is 204", 0)],
    "deepscaler": [("\\boxed{5}", 1), ("\\boxed{6}", 0)],
}


def write(path, rows):
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_and_grades(tmp_path, name, suffix):
    path = write(tmp_path / f"data{suffix}", [ROWS[name]] * 3)
    task = make_task(f"{name}:{path}")
    examples = task.examples("test", 2, 0)
    assert len(examples) == 2 and examples[0].prompt.endswith(BOX_INSTRUCTION)
    assert examples[0].level == ("level 2" if name == "math500" else "")
    texts, scores = zip(*RESPONSES[name], strict=True)
    assert [g.score for g in task.grade([examples[0]] * len(texts), texts)] == list(scores)
    assert task.answer_end("so \\boxed{7}. And") == len("so \\boxed{7}")


def test_an_evaluation_from_a_file(tmp_path, capsys):
    rows = [{"question": f"12*{i}=", "answer": f"#### {12 * i}"} for i in range(2, 6)]
    path = write(tmp_path / "gsm8k.jsonl", rows)
    settings = Evaluation(
        source=f"gsm8k:{path}",
        num_problems=4,
        num_responses=2,
        max_tokens=6,
        temperatures=(1.0,),
        top_p=0.9,
    )  # The embedded tokenizer has no letters: what it does not know becomes padding.
    (row,) = evaluate(make_model(), settings, responses=tmp_path / "responses", quiet=True)
    assert (
        row["avg"].value == 0 and row["notes"] == {"no box": 8} and row["settings"]["top_p"] == 0.9
    )
    assert len(row["problems"]["id"]) == 4 and row["answered"].value == 0


def test_bad_files(tmp_path):
    for name, row, message in [
        ("gsm8k", {"question": "x", "answer": "12"}, "row 0 of .* a GSM8K answer ends with"),
        (
            "math500",
            {"text": "x"},
            "row 0 of .* has the columns text; math500 needs 'problem' and 'answer'",
        ),
        ("aime24", {"problem": "x", "answer": "1/2"}, "an AIME answer is an integer"),
    ]:
        path = write(tmp_path / f"{name}.jsonl", [row])
        with pytest.raises(DataError, match=message):
            make_problems(Evaluation(source=f"{name}:{path}", num_problems=1))
    path = write(tmp_path / "one.jsonl", [ROWS["gsm8k"]])
    with pytest.raises(DataError, match="60 problems are asked for and it has 1"):
        make_problems(Evaluation(source=f"gsm8k:{path}"))


def test_clear_errors_for_missing_files_and_without_the_network(capsys):
    for source, message in [
        (
            "gsm8k:nowhere.jsonl",
            "'nowhere.jsonl' does not exist; give a file (.jsonl, .json, .csv, .parquet, .txt)",
        ),
        ("aime24", "data set 'HuggingFaceH4/aime_2024' is not here nor in the hub's cache"),
    ]:
        with pytest.raises(SystemExit) as error:
            main(["evaluate", "potstill:base", "--source", source])
        err = capsys.readouterr().err
        assert error.value.code == 2 and message in err and err.count("\n") == 1
    assert "give a folder or file" in err
