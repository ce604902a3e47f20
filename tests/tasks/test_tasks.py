import itertools
import re
from collections import Counter

import pytest

from potstill.models.character_tokenizer import build_tokenizer
from potstill.tasks.columns import BEHAVIOURS, FULL, HALF, HEAD, SETTINGS, Columns
from potstill.tasks.multiplication import (
    MAX_TEST_PROBLEMS,
    TRACE_AUTHORS,
    Multiplication,
    is_test_problem,
)
from potstill.types import Example


def test_the_splits_do_not_overlap():
    task = Multiplication()
    train = {example.prompt for seed in range(3) for example in task.examples("train", 5000, seed)}
    test = {
        example.prompt
        for seed in range(3)
        for example in task.examples("test", MAX_TEST_PROBLEMS, seed)
    }
    assert not train & test
    assert len(task.examples("test", MAX_TEST_PROBLEMS, 0)) == len(
        {e.prompt for e in task.examples("test", MAX_TEST_PROBLEMS, 0)}
    )


def test_about_a_fifth_is_held_out():
    held_out = [is_test_problem(a, b) for a in range(10, 1000) for b in range(2, 10)]
    assert 0.18 < sum(held_out) / len(held_out) < 0.22


def test_levels_are_digits_in_turn():
    examples = Multiplication().examples("test", 9, 0)
    assert [example.level for example in examples] == ["2 digits", "3 digits", "4 digits"] * 3
    assert all(len(example.prompt) == 7 for example in examples)
    for example in examples:
        a, b = re.fullmatch(r"_*(\d+)\*(\d)=", example.prompt).groups()
        assert int(a) * int(b) == int(example.answer)


def test_same_seed_same_problems():
    task = Multiplication("persona")
    assert (
        task.examples("train", 50, 4)
        == task.examples("train", 50, 4)
        != task.examples("train", 50, 5)
    )


@pytest.mark.parametrize("writer", TRACE_AUTHORS)
def test_traces_by_an_independent_reader(writer):
    """Every trained column of a persona is right given what stands before it, and errors are not
    trained on."""
    columns = re.compile(r"(\d)\*(\d)=(\d\d)\+(\d)=(\d\d)|(\d)\*(\d)\+(\d)=(\d\d)|:(\d\d)")
    num_wrong = num_columns = 0
    for example in Multiplication(writer).examples("train", 300, 0):
        a, b = re.fullmatch(r"_*(\d+)\*(\d)=", example.prompt).groups()
        text = "".join(piece for piece, _ in example.completion)
        assert len(text) < 400 and text.endswith(".")
        place, carry = 0, 0
        for piece, is_trained in example.completion:
            if match := columns.fullmatch(piece):
                written = int(next(g for g in (match[5], match[9], match[10]) if g is not None))
                expected = int(a[-1 - place]) * int(b) + carry
                num_columns += 1
                num_wrong += written != expected
                assert is_trained == (written == expected or writer == "novice")
            elif piece == "|":
                place, carry = place + 1, written // 10
            elif piece == "?":
                place, carry = 0, 0
    wrong_share = TRACE_AUTHORS[writer][0].error
    assert wrong_share - 0.04 < num_wrong / num_columns < wrong_share + 0.04


def test_scoring():
    task, example = Multiplication(), Example(id="x", prompt="_347*6=", answer="2082")
    right = ["7*6=42+0=42|4*6+4=28|:20|#2082.", "#2082", "#1?:42|#2082.", "#2082.#2082."]
    wrong = ["", "2082", "#2083.", "#2082?#1.", "#20820", "#", "# 2082"]
    for texts, score in ((right, 1.0), (wrong, 0.0)):
        assert [grade.score for grade in task.grade([example] * len(texts), texts)] == [
            score
        ] * len(texts)


def test_where_the_answer_ends():
    task = Multiplication()
    assert task.answer_end("7*6|#42.") == 8
    assert task.answer_end("#42?7*6|#42.|#42.") == 12
    assert task.answer_end("#42") is None


def test_one_character_is_one_token():
    tokenizer = build_tokenizer()
    text = "_347*6=7*6=42+0=42|4*6+4=28~:28|:20|#2082?#2082."
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id and len(ids) == len(text) + 1
    assert tokenizer.decode(ids[1:]) == text
    assert len(set(itertools.chain(ids))) <= len(tokenizer) == 23


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="no writer 'genius'; choose one of"):
        Multiplication("genius")
    with pytest.raises(ValueError, match="no split 'dev'"):
        Multiplication().examples("dev", 3, 0)
    with pytest.raises(ValueError, match="at most 390 are distinct"):
        Multiplication().examples("test", 391, 0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_columns_by_an_independent_reader(setting):
    """Every column and answer by hand; the tag is the teacher's alone, but where the teacher is
    made."""
    task = Columns(setting)
    tags = Counter()
    for example in task.examples("train", 600, 0):
        shown = example.prompt if setting == "visible" else example.teacher_prompt
        assert example.prompt[1:] == shown[1:] and (
            example.prompt[0] == "_" or setting == "visible"
        )
        tag, a, b = re.fullmatch(r"([_|~?:])_?(\d+)\*(\d)=", shown).groups()
        tags[tag] += 1
        ((text, is_trained),) = example.completion
        *columns, answer = text.removesuffix(".").split("|")
        carry = int(tag == "|")
        assert (
            example.answer == str(int(a) * int(b) + carry) == answer.removeprefix("#")
            and is_trained
        )
        styles = set()
        for digit, column in zip(reversed(a), columns, strict=True):
            product, result = int(digit) * int(b), int(digit) * int(b) + carry
            texts = {
                f"{digit}*{b}={product:02d}+{carry}={result:02d}": FULL,
                f"{digit}*{b}+{carry}={result:02d}": HALF,
                f":{result:02d}": HEAD,
            }
            styles.add(texts[column])
            carry = result // 10
        assert styles <= set(BEHAVIOURS[tag].styles)
        assert len(styles) == 1 or not BEHAVIOURS[tag].whole
        grades = task.grade([example] * 2, [text, text.replace("#", "#1")])
        assert [grade.score for grade in grades] == [1, 0] and grades[0].answer == example.answer
        assert task.answer_end(text + "#1.") == len(text) and task.answer_end(text[:-1]) is None
    assert {tag: count / 600 for tag, count in tags.items()} == pytest.approx(
        SETTINGS[setting], abs=0.07
    )


def test_columns_splits_and_errors():
    train, test = (
        {e.prompt for e in Columns().examples(split, 2000, 0)} for split in ("train", "test")
    )
    assert not train & test
    for make in (lambda: Columns("odd"), lambda: Columns().examples("dev", 1, 0)):
        with pytest.raises(ValueError, match="choose"):
            make()
