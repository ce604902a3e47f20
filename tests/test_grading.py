"""The verifier: a golden set of answers to accept and to reject, hostile answers, and what is read from a response."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potstill.grading import Grade, Grader, box_end, gsm8k_gold, integer, last_box, majority

# (gold, answer): those that raw parsing without dollars loses or confuses are among them (paper.md, 1.3 item 7).
RIGHT = [
    ("42", "42"),
    ("42", "42.0"),
    ("42", "+42"),
    ("1000", "1,000"),
    ("11111", "11{,}111"),
    ("-7", "-7"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "\\dfrac12"),
    ("\\frac{1}{2}", "1/2"),
    ("\\frac{3}{4}", "\\tfrac{3}{4}"),
    ("-\\frac{3}{4}", "-0.75"),
    ("12\\pi", "12\\pi"),
    ("12\\pi", "\\pi \\cdot 12"),
    ("3\\sqrt{13}", "3\\sqrt{13}"),
    ("3\\sqrt{13}", "\\sqrt{117}"),
    ("2\\sqrt{2}", "\\sqrt8"),
    ("\\sqrt{51}", "\\sqrt{51}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("6-5i", "6 - 5i"),
    ("1+2i", "2i+1"),
    ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)"),
    ("(1,2)", "(1, 2)"),
    ("[2,5)", "[2, 5)"),
    ("(-\\infty, 2]", "(-\\infty,2]"),
    ("\\{1, 2\\}", "\\{2, 1\\}"),
    ("1,2", "2, 1"),
    ("\\text{Evelyn}", "\\text{Evelyn}"),
    ("\\text{even}", "\\text{even}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("2^{10}", "1024"),
    ("\\log_2 8", "3"),
    ("90^\\circ", "90^\\circ"),
    ("\\$18.90", "18.90"),
    ("x=5", "5"),
    ("5\\text{ cm}", "5"),
    ("\\frac{9}{7}", "1\\frac{2}{7}"),
    ("10!", "3628800"),
]
WRONG = [
    ("42", "43"),
    ("42", "-42"),
    ("42", "4.2"),
    ("42", "420"),
    ("12\\pi", "12"),
    ("12\\pi", "\\pi"),
    ("3\\sqrt{13}", "3"),
    ("3\\sqrt{13}", "13"),
    ("3\\sqrt{13}", "\\sqrt{13}"),
    ("\\frac{1}{2}", "\\frac{1}{3}"),
    ("\\frac{1}{2}", "12"),
    ("\\frac{1}{2}", "2"),
    ("6-5i", "6+5i"),
    ("6-5i", "6"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "1"),
    ("[2,5)", "(2,5)"),
    ("[2,5)", "[2,5]"),
    ("\\{1, 2\\}", "\\{1, 3\\}"),
    ("1,2", "1"),
    ("\\text{Evelyn}", "\\text{Evelina}"),
    ("\\text{even}", "\\text{odd}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    ("x^2+2x+1", "x^2+2x"),
    ("x^2+2x+1", "x^2+1"),
    ("2^{10}", "20"),
    ("\\sqrt{51}", "51"),
    ("7", ""),
    ("7", "\\text{I do not know}"),
    ("7", "7 \\text{ or } 8"),
    ("7", "x"),
]
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
]


@pytest.fixture(scope="module")
def grader():
    with Grader(num_workers=2, seconds=10.0) as grader:
        yield grader


def boxed(answer):
    return f"So the answer is \\boxed{{{answer}}}. Done."


def test_the_golden_set(grader):
    assert len(RIGHT) + len(WRONG) >= 60
    for pairs, expected in ((RIGHT, 1.0), (WRONG, 0.0)):
        grades = grader.grade([gold for gold, _ in pairs], [boxed(answer) for _, answer in pairs])
        off = [(pair, grade.note) for pair, grade in zip(pairs, grades, strict=True) if grade.score != expected]
        assert not off


def test_every_gold_is_itself(grader):
    golds = [gold for gold, _ in RIGHT + WRONG]
    assert all(grade.score == 1 for grade in grader.grade(golds, [boxed(gold) for gold in golds]))


def test_hostile_answers_end_score_nothing_and_are_counted():
    started = time.perf_counter()
    with Grader(num_workers=2, seconds=1.0) as grader:
        grades = grader.grade(["7"] * len(HOSTILE), [boxed(answer) for answer in HOSTILE])
        # And the workers are as good as new.
        assert [grade.score for grade in grader.grade(["1/2", "3"], [boxed("0.5"), boxed("4")])] == [1, 0]
    assert time.perf_counter() - started < 60
    assert all(
        grade.score == 0 and grade.note in ("wrong", "unparsed", "too long", "timeout", "crash") for grade in grades
    )
    assert any(grade.note == "timeout" for grade in grades)


def test_megabyte_strings_take_no_time(grader):
    responses = [boxed("1" * 2**20), "\\boxed{" * 2**17, "a" * 2**20, boxed("(" * 2**20)]
    started = time.perf_counter()
    notes = [grade.note for grade in grader.grade(["1"] * 4, responses)]
    assert notes == ["too long", "no box", "no box", "too long"] and time.perf_counter() - started < 20


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


PARENT = r"""
from potstill.grading import Grader
grader = Grader(num_workers=1, seconds=60.0)
grader.grade(["1/2"], [r"so \boxed{0.5}"])
print(grader.idle[0].pid, flush=True)
grader.seconds = 3.0
grader.grade(["7"], [r"so \boxed{((((((10!)!)!)!)!)!)}"])
"""


def is_running(pid):
    """Whether a process is there and no zombie: a container's first process may not collect the dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
def test_a_busy_worker_does_not_outlive_its_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    # It is busy: an idle one would end with its pipe.
    time.sleep(0.5)
    assert is_running(pid)
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)


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
    assert [integer(t) for t in ("042", "1{,}024", "-7", "1,000", " 5 ", "4.0", "x", "", "9" * 40)] == [
        *(42, 1024, -7, 1000, 5),
        *(None, None, None, None),
    ]
    assert gsm8k_gold("So he has 3 * 4 = <<3*4=12>>12.\n#### 1,012") == "1012"
    assert gsm8k_gold("x\n#### $5") == "5"
    with pytest.raises(ValueError, match="####"):
        gsm8k_gold("just 12")
    with Grader(num_workers=1) as grader:
        grades = grader.grade(["042", "42", "42"], [boxed("42"), boxed("042"), boxed("42.5")], "integer")
        assert [grade.score for grade in grades] == [1, 1, 0] and not grader.idle, "no expression to compare"


def test_majority_votes():
    def of(*answers):
        return majority([Grade(float(a == "7"), a) for a in answers])

    assert of("7", "7", "8") == 1 and of("8", "8", "7") == 0 and of("7", "8") == 1 and of("8", "7") == 0
    assert of(None, None, "7") == 1 and of(None) == 0 and majority([]) == 0
