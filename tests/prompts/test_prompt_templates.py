"""Prompts that are filled in from columns: as str.format has them, and nothing more than names."""

import json

import pytest
from conftest import tiny_recipe

from potstill.config import RecipeError, make_recipe
from potstill.models.character_tokenizer import build_tokenizer
from potstill.prompts.examples import load_examples
from potstill.prompts.prepare import prepare_prompts
from potstill.tasks.filling import columns_of
from potstill.types import DataError

ROWS = [
    {"question": "What is {two}?", "n": 1.50, "the name": "a", "level": "easy"},
    {"question": "Say “{}”.\n", "n": 3, "the name": "é", "completion": "No."},
]


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "template",
    [
        "Question: {question}\nAnswer:",
        "{question}{question}",
        'As JSON: {{"q": "{question}", "n": {n}}}',
        "{the name}: {n} {{n}} {{{n}}}",
    ],
)
def test_a_template_is_filled_as_by_format(tmp_path, template):
    examples = load_examples(write(tmp_path, *ROWS), prompt_template=template)
    assert [example.prompt for example in examples] == [template.format_map(row) for row in ROWS]
    assert [example.completion for example in examples] == [None, (("No.", True),)]


def test_numbers_are_as_they_are_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1.50, "m": 12345678901234567890, "s": "007"}\n')
    (example,) = load_examples(str(path), prompt_template="{n} {m} {s}")
    assert example.prompt == "1.50 12345678901234567890 007"


def test_tables_and_text_are_filled_in_too(tmp_path):
    (tmp_path / "rows.csv").write_text('question,hint\n"Two, or three?",two\n')
    (example,) = load_examples(str(tmp_path / "rows.csv"), prompt_template="{question} ({hint})")
    assert example.prompt == "Two, or three? (two)"
    (tmp_path / "rows.txt").write_text("Why?\n")
    (example,) = load_examples(str(tmp_path / "rows.txt"), prompt_template="Q: {prompt}\nA:")
    assert example.prompt == "Q: Why?\nA:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question.__class__}", r"\{question\.__class__\} is no name of a column; write \{name\}"),
        ("{question[0]}", r"\{question\[0\]\} is no name of a column"),
        ("{question!r}", r"\{question!r\} is no name of a column"),
        ("{question:>99999999999}", r"\{question:>99999999999\} is no name of a column"),
        ("{question:{n}}", r"is no name of a column"),
        ("{}", r"\{\} is no name of a column"),
        (
            "{question",
            r"its braces do not match \(expected '\}' before end of string\); write a column",
        ),
        ('{"q": {question}}', r"is no name of a column|write a column as"),
        ("Say }", r"braces do not match \(Single '\}' encountered in format string\); write"),
        ("Answer:", r"it names no column, so that all prompts were one; write \{name\}"),
    ],
)
def test_templates_hold_names_and_nothing_else(template, message):
    data = {"source": "rows.jsonl", "prompt_template": template}
    with pytest.raises(RecipeError, match=f"data.prompt_template is .*: .*({message})") as error:
        make_recipe({"data": data})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        columns_of(template)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "a", "n": 1}, r"no column 'question', which data\.prompt_template names, only n, q"),
        ({"question": None}, r"'question', which data\.prompt_template names, is empty; fill it"),
        ({"question": ["a"]}, r"names, is \['a'\]; it must be .* data.prompt_column names"),
    ],
)
def test_rows_that_cannot_fill_it_are_named(tmp_path, row, message):
    file = write(tmp_path, ROWS[0], row)
    with pytest.raises(DataError, match=r"row 1 of .*rows\.jsonl'.*" + message):
        load_examples(file, prompt_template="Question: {question}")


def test_a_template_takes_the_place_of_a_column():
    files = {"source": "rows.jsonl", "prompt_template": "{a}"}
    for data, teacher, message in [
        (files | {"prompt_column": "a"}, {}, r"data\.prompt_column is set but not read"),
        ({"prompt_template": "{a}"}, {}, r"data\.prompt_template is set but not read"),
        (
            files,
            {"prompt_column": "a", "prompt_template": "{a}"},
            r"teacher\.prompt_column is set but not read",
        ),
    ]:
        with pytest.raises(RecipeError, match=message):
            make_recipe({"data": data, "teacher": teacher})


class Model:
    """The attributes of a model that the preparing of prompts reads."""

    context_length = None
    tokenizer = build_tokenizer()


def test_the_teacher_has_a_template_of_its_own(tmp_path):
    rows = [{"a": 12, "b": 3, "hint": "36"}, {"a": 4, "b": 5, "hint": "20"}]
    recipe = tiny_recipe(
        tmp_path / "run",
        data={
            "source": write(tmp_path, *rows),
            "num_prompts": None,
            "prompt_template": "{a}*{b}=",
        },
        teacher={"prompt_template": "{hint}#{a}*{b}="},
    )
    for given in (None, rows):
        prompts, _ = prepare_prompts(
            recipe, Model(), Model(), end_ids=(2,), date="2026-01-01", given=given
        )
        texts = [
            [Model.tokenizer.decode(prompt.ids_of(who)) for who in ("student", "teacher")]
            for prompt in prompts
        ]
        assert texts == [["<bos>12*3=", "<bos>36#12*3="], ["<bos>4*5=", "<bos>20#4*5="]]
