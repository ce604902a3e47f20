"""The verifier: a golden set of answers to accept and to refuse, hostile answers, and what is read
from a response."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.answers import integer
from potstill.answers.boxes import box_end, last_box
from potstill.answers.grading import Grade, Grader, gsm8k_gold, majority

GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden_answers.jsonl").read_text().splitlines()
]
# Powers of 3,700 digits: understood, and seconds of work.
SLOW = "2^{6000}+" + "+".join(rf"{k}^{{e^\pi}}" for k in range(10, 85))
HOSTILE = [
    "9^{9^{9^{9}}}",
    "((((((10!)!)!)!)!)!)",
    "\\sum_{i=1}^{10^{12}} i^i",
    "(x+1)^{1000000}-(x-1)^{1000000}",
    "\\int \\sin(\\cos(\\tan(x^{x^{x}}))) dx",
    "2^{100000000000}",
    "\\frac{" * 200 + "1" + "}{2}" * 200,
    "{" * 400 + "}" * 400,
    "1+" * 480 + "1",
    "\\sqrt[" * 90 + "2" + "]{2}" * 90,
    "2^{2^{2^{2^{2^{2^{2}}}}}}",
    "10^{199999}!",
    "\\binom{10^9}{5 \\cdot 10^8}",
    "+".join(["1/3^{9999}"] * 90),
    "x^{2}" * 190,
    "\\text{" * 140 + "}" * 140,
    SLOW,
]


@pytest.fixture(scope="module")
def grader():
    with Grader(num_workers=2, seconds=10.0) as grader:
        yield grader


def boxed(answer):
    return f"So the answer is \\boxed{{{answer}}}. Done."


@pytest.mark.parametrize("kind", ["latex", "integer"])
def test_the_golden_set(grader, kind):
    rows = [row for row in GOLDEN if row["kind"] == kind]
    responses = [row["response"] if "response" in row else boxed(row["answer"]) for row in rows]
    grades = grader.grade([row["gold"] for row in rows], responses, kind)
    graded = list(zip(rows, grades, strict=True))
    assert not [(row, grade.note) for row, grade in graded if grade.score and not row["right"]]
    refused = [(row, grade.note) for row, grade in graded if row["right"] and not grade.score]
    assert len(refused) <= 0.02 * sum(row["right"] for row in rows), refused
    assert all(grade.note and grade.note not in ("timeout", "crash") for grade in grades)


def test_the_golden_set_is_large_and_balanced():
    num_right = sum(row["right"] for row in GOLDEN)
    assert len(GOLDEN) >= 600 and 0.4 < num_right / len(GOLDEN) < 0.6


def test_every_gold_is_itself(grader):
    golds = sorted({row["gold"] for row in GOLDEN if row["kind"] == "latex"})
    assert all(grade.score == 1 for grade in grader.grade(golds, [boxed(gold) for gold in golds]))


@pytest.mark.parametrize(
    ("gold", "answer", "kind", "rule"),
    [
        ("5", "5", "latex", "same text"),
        ("1, 2, \\ldots, n", "1,2,\\ldots,n", "latex", "same text"),
        ("0.5", "1/2", "latex", "value"),
        ("0.5", "1/3", "latex", "value"),
        ("0.5", "1/2+", "latex", "not understood"),
        ("\\int_0^1 x", "1/2", "latex", "gold not understood"),
        ("33", "33.0", "integer", "integer"),
        ("33", "3 3", "integer", "integer"),
        ("5", None, "latex", "no box"),
        ("5", "1" * 1001, "latex", "too long"),
    ],
)
def test_each_grade_names_the_rule_that_decided(grader, gold, answer, kind, rule):
    (grade,) = grader.grade([gold], ["nothing" if answer is None else boxed(answer)], kind)
    assert grade.note == rule and grade.answer == answer


def cpu_seconds():
    """Seconds that this process and those that it waited for have computed."""
    return sum(os.times()[:4])


def test_hostile_answers_end_score_nothing_and_are_counted():
    before = cpu_seconds()
    with Grader(num_workers=2, seconds=0.5) as grader:
        grades = grader.grade(["7"] * len(HOSTILE), [boxed(answer) for answer in HOSTILE])
        # And the workers are as good as new.
        grader.seconds = 10.0
        assert [
            grade.score for grade in grader.grade(["1/2", "3"], [boxed("0.5"), boxed("4")])
        ] == [1, 0]
    assert cpu_seconds() - before < 60
    assert not any(grade.score for grade in grades)
    assert grades[-1].note == "timeout"


def test_megabyte_strings_take_no_time(grader):
    responses = [boxed("1" * 2**20), "\\boxed{" * 2**17, "a" * 2**20, boxed("(" * 2**20)]
    before = cpu_seconds()
    notes = [grade.note for grade in grader.grade(["1"] * 4, responses)]
    assert notes == ["too long", "no box", "no box", "too long"] and cpu_seconds() - before < 20


def test_a_worker_that_dies_is_replaced(grader):
    grader.grade(["1"], [boxed("2")])
    for worker in grader.idle:
        worker.kill()
        worker.wait()
    grades = grader.grade(["1/2"] * 3, [boxed(f"{i}/4") for i in (1, 2, 3)])
    assert sum(grade.score for grade in grades) <= 1
    assert [grade.score for grade in grader.grade(["1/2"], [boxed("2/4")])] == [1]


def test_no_process_is_left():
    with Grader(num_workers=1) as grader:
        grader.grade(["1"], [boxed("2/2")])
        (pid,) = [worker.pid for worker in grader.idle]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# Minutes of work: each power of one list against each of the other.
POWERS = [rf"{k}^{{e^\pi}}+2^{{6000}}" for k in range(10, 60)]
# It is killed as soon as it waits for the answer to its second question.
PARENT = f"""
import os, selectors, signal
from potstill.answers.grading import Grader
grader = Grader(num_workers=1, seconds=60.0)
grader.grade(["1/2"], [{boxed("0.5")!r}])
print(grader.idle[0].pid, flush=True)
selectors.DefaultSelector.select = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
grader.seconds = 0.5
grader.grade([{",".join(POWERS)!r}], [{boxed(",".join(POWERS[::-1]))!r}])
"""
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def inherits_orphans():
    """Make processes whose parent has died this one's own, to be waited for."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans over")
def test_a_busy_worker_does_not_outlive_its_killed_parent(inherits_orphans):
    parent = subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.returncode == -signal.SIGKILL
    _, status = os.waitpid(int(parent.stdout), 0)
    # Its own alarm has ended it: it was busy, as an idle one ends with its pipe and exits with 0.
    assert os.waitstatus_to_exitcode(status) == -signal.SIGALRM


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("first \\boxed{3}, then \\boxed{4 and it goes on", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\fbox{5} \\fboxed{6}", "6"),
        ("\\boxed {7}", "7"),
        ("\\boxed{}", ""),
        ("the answer is 8", None),
        ("\\boxed{9", None),
        ("so \\boxed 5.", "5"),
        ("so $\\boxed 5$ it is", "5"),
        ("\\(\\boxed-3\\)", "-3"),
        ("\\boxed \\frac{1 + x}{2}, and", "\\frac{1 + x}{2}"),
        ("{\\boxed 5}", "5"),
        ("a \\boxed and a \\boxed word", None),
        ("\\boxed\\boxed{5}", "5"),
        ("", None),
    ],
)
def test_the_last_closed_box(text, box):
    assert last_box(text) == box


def test_where_the_first_box_ends():
    text = "so \\boxed{\\frac{1}{2}} is it, \\boxed{3}"
    assert text[: box_end(text)] == "so \\boxed{\\frac{1}{2}}"
    assert box_end("\\boxed{3") is None


def test_integers_and_gsm8k():
    texts = (
        "042",
        "1{,}024",
        "-7",
        "1,000",
        " 5 ",
        "4.0",
        "1\\,000",
        "x",
        "",
        "4.5",
        "9/2",
        "3,4",
        "1,00",
        "5/0",
        "5\\%",
    )
    assert [integer(text) for text in texts] == [42, 1024, -7, 1000, 5, 4, 1000, *[None] * 8]
    assert gsm8k_gold("So he has 3 * 4 = <<3*4=12>>12.\n#### 1,012") == "1012"
    assert gsm8k_gold("x\n#### $5") == "5"
    with pytest.raises(ValueError, match="####"):
        gsm8k_gold("just 12")
    with Grader(num_workers=1) as grader:
        grades = grader.grade(
            ["042", "42", "42"], [boxed("42"), boxed("042"), boxed("42.5")], "integer"
        )
        assert [grade.score for grade in grades] == [1, 1, 0] and not grader.idle, (
            "no expression to compare"
        )


def test_majority_votes():
    def of(*answers):
        return majority([Grade(float(a == "7"), a) for a in answers])

    assert (
        of("7", "7", "8") == 1
        and of("8", "8", "7") == 0
        and of("7", "8") == 1
        and of("8", "7") == 0
    )
    assert of(None, None, "7") == 1 and of(None) == 0 and majority([]) == 0
