import json

import pytest
from conftest import make_model

from potstill.models.character_tokenizer import build_tokenizer
from potstill.prompts.examples import load_examples, make_prompts, prompt_notes
from potstill.types import DataError, Example

CHAT = (
    "{% for m in messages %}{{ m.content }}={% endfor %}{% if add_generation_prompt %}#{% endif %}"
)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(examples, template=None, end_ids=None, tokenizer=None, **arguments):
    tokenizer = tokenizer or build_tokenizer()
    settings = {"max_completion": 8, "context_length": 64} | arguments
    return make_prompts(examples, tokenizer, template=template, end_ids=end_ids, **settings)


def test_the_three_shapes_of_a_row(tmp_path):
    chat = [{"role": "user", "content": "12"}]
    shapes = [
        {"prompt": "12*3="},
        {"prompt": "12*3=", "completion": "36"},
        {"prompt": chat, "completion": [{"role": "assistant", "content": "36"}]},
        {
            "messages": [*chat, {"role": "assistant", "content": "36"}],
            "answer": 36,
            "level": "easy",
            "id": 7,
        },
    ]
    for row in shapes:
        (example,) = load_examples(write_jsonl(tmp_path / "rows.jsonl", [row]))
        of_messages = ({"role": "assistant", "content": "36"},)
        assert (
            example.completion
            == [None, (("36", True),), of_messages, of_messages][shapes.index(row)]
        )
        assert example.prompt == ("12*3=" if isinstance(row.get("prompt"), str) else tuple(chat))
    assert (example.answer, example.level, example.id) == ("36", "easy", "7")


def test_parquet_and_column_name(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"problem": ["1*2=", "3*4="]}), tmp_path / "rows.parquet"
    )
    examples = load_examples(str(tmp_path / "rows.parquet"), prompt_column="problem")
    assert [example.prompt for example in examples] == ["1*2=", "3*4="]
    with pytest.raises(
        DataError,
        match=r"row 0 .* has no column 'prompt' .*only problem; name the column with "
        r"data.prompt_col",
    ):
        load_examples(str(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match=r"3 examples are asked of .* which has 2"):
        load_examples(str(tmp_path / "rows.parquet"), prompt_column="problem", num_examples=3)


def test_folders_and_splits_as_on_the_hub(tmp_path):
    for split, prompt in (("train", "1*2="), ("test", "3*4=")):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"prompt": prompt}])
    for split, prompt in (("train", "1*2="), ("test", "3*4=")):
        (example,) = load_examples(str(tmp_path), split=split)
        assert example.prompt == prompt
    with pytest.raises(DataError, match=r"split 'dev'\) cannot be read"):
        load_examples(str(tmp_path), split="dev")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows; give a data source with at least one prompt"),
        ([{"prompt": ""}], "row 0 .*'prompt' is ''"),
        ([{"prompt": "1"}, {"prompt": None}], "row 1 .*'prompt' is empty"),
        ([{"prompt": [{"role": "user"}]}], "each needs `role` and `content`"),
        ([{"prompt": 3}], "'prompt' is 3"),
        ([{"prompt": "1", "completion": 3}], "`completion` is 3"),
        ([{"messages": [{"role": "system", "content": "1"}]}], "must be the assistant's turn"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_examples(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"'none.jsonl' does not exist"):
        load_examples("none.jsonl")
    with pytest.raises(
        DataError, match=r"data set 'nobody/nothing' is not here nor in the hub's cache"
    ):
        load_examples("nobody/nothing")
    (tmp_path / "rows.md").write_text("hello")
    with pytest.raises(DataError, match="of no known kind"):
        load_examples(str(tmp_path / "rows.md"))
    with pytest.raises(DataError, match="no task 'gsm_symbolc'; the nearest are gsm_symbolic"):
        load_examples("reasoning-gym:gsm_symbolc")


def test_templates():
    tokenizer = build_tokenizer()
    chat = Example(id="c", prompt=({"role": "user", "content": "12"},))
    raw = Example(id="r", prompt="12")
    with pytest.raises(
        DataError, match=r"the tokenizer has none.* that has one, or give prompts that are strings"
    ):
        prompts([chat])
    with pytest.raises(
        DataError, match=r'the tokenizer has none.* that has one, or set template = "raw"'
    ):
        prompts([raw], "chat")
    tokenizer.chat_template = CHAT
    # The template brings its own first token, or none: nothing is added to it.
    assert tokenizer.decode(prompts([chat], tokenizer=tokenizer)[0].token_ids) == "12=#"
    assert tokenizer.decode(prompts([raw], "chat", tokenizer=tokenizer)[0].token_ids) == "12=#"
    assert tokenizer.decode(prompts([raw], tokenizer=tokenizer)[0].token_ids) == "<bos>12"
    assert (
        "taken as they are"
        in prompt_notes(1, prompts([raw], tokenizer=tokenizer), tokenizer, None)[0]
    )
    assert not prompt_notes(1, prompts([raw], "raw", tokenizer=tokenizer), tokenizer, "raw")
    assert not prompt_notes(1, prompts([chat], tokenizer=tokenizer), tokenizer, None)
    with pytest.raises(DataError, match=r'data.template is "raw"'):
        prompts([chat], "raw", tokenizer=tokenizer)


def test_completions_keep_what_is_trained_and_end():
    example = Example(id="e", prompt="1*2=", completion=(("34", False), ("~", True), ("2", True)))
    (prompt,) = prompts([example], end_ids=(2,))
    assert build_tokenizer().decode(prompt.completion_ids) == "34~2<eos>"
    assert prompt.trained == (False, False, True, True, True)
    with pytest.raises(DataError, match="has no completion"):
        prompts([Example(id="e", prompt="1*2=")], end_ids=(2,))


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(
        DataError, match=r"prompt 'long' has 58 tokens, which with 8 .* more than the context of 64"
    ):
        prompts([Example(id="fine", prompt="1"), Example(id="long", prompt="1" * 57)])
    with pytest.raises(DataError, match="prompt list is empty"):
        prompts([])


def test_reasoning_gym_by_name():
    examples = load_examples("reasoning-gym:basic_arithmetic", num_examples=5)
    again = load_examples("reasoning-gym:basic_arithmetic", num_examples=5)
    held_out = load_examples("reasoning-gym:basic_arithmetic", num_examples=5, split="test")
    assert examples == again and [e.prompt for e in examples] != [e.prompt for e in held_out]
    from potstill.tasks import make_task

    task = make_task("reasoning-gym:basic_arithmetic")
    example = task.examples("train", 3, 0)[1]
    right = f"so <answer>{example.answer}</answer> it is"
    wrong = f"first 1, then <answer>{example.answer}1</answer>"
    grades = task.grade([example] * 3, [example.answer, right, wrong])
    assert grades[0].score == 0 and grades[1].score == 1 and grades[2].score < 1
    assert all(e.prompt.endswith("between <answer> and </answer>.") for e in examples)
    assert task.answer_end("x <answer>3</answer> y") == 20


def test_student_context_is_what_counts():
    assert make_model().context_length == 128
