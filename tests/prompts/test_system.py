"""The system prompt of a recipe: as if each chat began with it, and a refusal where there is no
place for it."""

import json

import pytest
from conftest import tiny_recipe
from odd_models import make_tiny, write_folder
from odd_tokenizers import chat_template, family_tokenizer

from potstill.cli.app import main
from potstill.config import Evaluation, RecipeError, make_recipe, run_evaluation
from potstill.evaluation.scores import prepare_problems
from potstill.models.language_model import LanguageModel
from potstill.prompts.prepare import prepare_prompts
from potstill.types import DataError

SYSTEM = "Answer in French."
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
OWN = {"role": "system", "content": "Be brief."}


class Model:
    """The attributes of a model that the preparing of prompts reads."""

    context_length = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def prepared(tmp_path, family, rows, *, asked=None, **sections):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(path), "num_prompts": None, "system": SYSTEM} | sections.pop("data", {})
    recipe = tiny_recipe(tmp_path / "run", data=data, **sections)
    model = Model(family_tokenizer(family))
    return prepare_prompts(recipe, model, asked, end_ids=(0,), date="2026-01-01")


@pytest.mark.parametrize("family", ["chatml", "llama", "gemma", "gpt-oss"])
def test_each_chat_begins_with_it_as_in_transformers(tmp_path, family):
    """Gemma's template writes it into the user's message; a chat's own system message stays."""
    rows = [{"prompt": "Hi"}, {"prompt": [HI, HELLO, HI]}, {"prompt": [OWN, HI]}]
    if family == "gpt-oss":
        rows.append({"prompt": [OWN | {"role": "developer"}, HI]})
    prompts, notes = prepared(tmp_path, family, rows, data={"template": "chat"})
    tokenizer = family_tokenizer(family)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        'strftime_now("%Y-%m-%d")', '"2026-01-01"'
    ).replace('strftime_now("%d %b %Y")', '"01 Jan 2026"')
    ours = {"role": "system", "content": SYSTEM}
    chats = [[ours, HI], [ours, HI, HELLO, HI], *(row["prompt"] for row in rows[2:])]
    expected = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in chats
    ]
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == expected
    assert all(SYSTEM in text for text in expected[:2])
    num_own = len(rows) - 2
    assert (
        f"{num_own} of {len(rows)} prompts have a system message of their own, which stays in "
        "place of the system prompt"
    ) in notes
    # Tasks grade what they made.
    assert [prompt.example.prompt for prompt in prompts[:2]] == ["Hi", (HI, HELLO, HI)]


def test_the_teacher_reads_it_too(tmp_path):
    teacher = Model(family_tokenizer("llama"))
    options = {"data": {"template": "chat"}, "teacher": {"prompt_column": "hint"}}
    rows = [{"prompt": "Hi", "hint": "Hi, you"}, {"prompt": "Hi", "hint": [OWN, HI]}]
    prompts, _ = prepared(tmp_path, "llama", rows, asked=teacher, **options)
    texts = [teacher.tokenizer.decode(prompt.teacher_ids) for prompt in prompts]
    assert SYSTEM in texts[0] and "Hi, you" in texts[0]
    assert SYSTEM not in texts[1] and "Be brief." in texts[1]
    options["teacher"]["template"] = "raw"
    prompts, _ = prepared(tmp_path, "llama", rows[:1], asked=teacher, **options)
    assert teacher.tokenizer.decode(prompts[0].teacher_ids) == "Hi, you"
    assert SYSTEM in teacher.tokenizer.decode(prompts[0].token_ids)


def test_templates_and_prompts_that_have_no_place_for_it(tmp_path):
    with pytest.raises(DataError, match=r"prompt '0' \(row 0 .*is taken as it is, .*\"chat\""):
        prepared(tmp_path, "chatml", [{"prompt": "Hi"}])
    with pytest.raises(RecipeError, match=r"data\.system is set but not read: data\.template is"):
        make_recipe({"data": {"template": "raw", "system": SYSTEM}})
    refusing = family_tokenizer("chatml")
    refusing.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + chat_template("qwen2_5")
    )
    model = LanguageModel(make_tiny(refusing), refusing, "tiny")
    evaluation = Evaluation(source="multiplication", num_problems=1, template="chat", system="x")
    with pytest.raises(DataError) as error:
        prepare_problems(model, evaluation)
    assert str(error.value).endswith(
        ": the chat template takes no system message (it refuses: System role not supported); "
        "leave data.system or that message out, or put its words into what the user says"
    )
    assert prepare_problems(model, evaluation.model_copy(update={"system": ""}))


def test_the_evaluation_of_a_run_has_that_of_its_data():
    def evaluation(**fields):
        recipe = make_recipe(
            {"data": {"system": SYSTEM}, "evaluation": {"source": "multiplication", **fields}}
        )
        return run_evaluation(recipe).system

    assert evaluation(template="chat") == SYSTEM
    assert evaluation(template="chat", system="Else.") == "Else."
    assert evaluation(template="chat", system="") == ""
    assert evaluation() is None is evaluation(template="raw")


def test_sample_takes_it(tmp_path, capsys):
    tokenizer = family_tokenizer("chatml")
    folder = write_folder(tmp_path / "model", tokenizer, make_tiny(tokenizer))
    options = ["--prompt", "Hi", "--max-tokens", "2", "--num", "1", "--system", SYSTEM]
    main(["sample", str(folder), *options, "--template", "chat"])
    assert f"<|im_start|>system\n{SYSTEM}<|im_end|>" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["sample", str(folder), *options])
    assert "is taken as it is, and a system prompt needs a chat" in capsys.readouterr().err
