"""Conversations of which the last turn of the assistant's is trained on, or all of them."""

import itertools
import json

import pytest
from conftest import tiny_recipe
from odd_models import make_tiny
from odd_tokenizers import chat_template, family_tokenizer

import potstill
from potstill.config import RecipeError, make_recipe
from potstill.prompts.examples import load_examples, make_prompts
from potstill.types import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHATS = [
    [
        user("Hi"),
        assistant("Hello"),
        user("One file?"),
        assistant("no"),
        user("!"),
        assistant("ok"),
    ],
    [SYSTEM, user("Hi"), assistant("Hello"), user("And?"), assistant("No")],
    [user("Hi"), assistant("Hello")],
]
ENDS = {"chatml": "<|im_end|>", "llama": "<|eot_id|>", "gemma": "<end_of_turn>"}


def prompts_of(tmp_path, tokenizer, *rows, train_on="all"):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(str(path), train_on=train_on)
    end_ids = (tokenizer.eos_token_id,)
    return make_prompts(
        examples,
        tokenizer,
        template=None,
        max_completion=8,
        context_length=None,
        end_ids=end_ids,
    )


def pairs_of(prompt):
    """Each token, and whether it is trained on."""
    tokens = [(i, False) for i in prompt.token_ids]
    return tokens + list(zip(prompt.completion_ids, prompt.trained, strict=True))


def transformers_pairs(tokenizer, row):
    """The same by the template's own marks of what the assistant wrote.

    Some put the line break after an end among it; no model writes that, as it has ended.
    """
    given = tokenizer.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, masks = given["input_ids"], given["assistant_masks"]
    end, (line,) = tokenizer.eos_token_id, tokenizer.encode("\n", add_special_tokens=False)
    is_after_end = [False, *(a == end and b == line for a, b in itertools.pairwise(ids))]
    return [
        (i, bool(mask) and not after)
        for i, mask, after in zip(ids, masks, is_after_end, strict=True)
    ]


@pytest.mark.parametrize(
    ("family", "template"),
    [("llama", "llama3_training"), ("gemma", "gemma_training"), ("chatml", "qwen3_training")],
)
def test_all_turns_are_those_that_the_template_marks(tmp_path, family, template):
    tokenizer = family_tokenizer(family)
    tokenizer.chat_template = chat_template(template)
    tokenizer.eos_token = ENDS[family]
    # Gemma's template takes no system message.
    rows = [{"messages": chat} for chat in CHATS if family != "gemma" or chat[0] != SYSTEM]
    if family == "chatml":
        calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        result = {"role": "tool", "content": "4"}
        rows.append({"messages": [user("Add"), calls, result, assistant("four")], "tools": [TOOL]})
    prompts = prompts_of(tmp_path, tokenizer, *rows)
    last = prompts_of(tmp_path, tokenizer, *rows, train_on="last")
    for row, prompt, short in zip(rows, prompts, last, strict=True):
        expected = transformers_pairs(tokenizer, row)
        ours = pairs_of(prompt)
        # After the last end there is at most a line break.
        assert ours == expected[: len(ours)] and len(expected) - len(ours) <= 1
        num_last = len(short.completion_ids)
        assert pairs_of(short)[-num_last:] == ours[-num_last:]
        assert not any(is_trained for _, is_trained in pairs_of(short)[:-num_last])
        assert short.token_ids + short.completion_ids == prompt.token_ids + prompt.completion_ids


def test_by_hand(tmp_path):
    """Trained tokens in brackets, of a template that leaves out the thoughts of earlier turns."""
    tokenizer = family_tokenizer("chatml")
    (prompt,) = prompts_of(tmp_path, tokenizer, {"messages": CHATS[1]})
    shown = "".join(
        f"[{tokenizer.decode([i])}]" if is_trained else tokenizer.decode([i])
        for i, is_trained in pairs_of(prompt)
    )
    assert shown.replace("][", "") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[Hello<|im_end|>]\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n[<think>\n\n</think>\n\nNo<|im_end|>]"
    )


def test_turns_that_merge_with_what_stands_around_them_are_refused(tmp_path):
    """A tokenizer that joins letters over the border of a turn: the second turn would be trained
    on after tokens that no model ever reads."""
    tokenizer = family_tokenizer("plain")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '|' if m.role == 'user' else '' }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    )
    fine = {"messages": [user("a"), assistant(" one"), user("b"), assistant(" two")]}
    joined = {"messages": [user("th"), assistant("e file"), user("b"), assistant(" two")]}
    text = "|the file"
    whole = tokenizer.encode(text, add_special_tokens=False)
    parts = [
        *tokenizer.encode("|th", add_special_tokens=False),
        *tokenizer.encode("e file", add_special_tokens=False),
    ]
    assert whole != parts, "the tokenizer joins what this test needs joined"
    prompts_of(tmp_path, tokenizer, fine)
    prompts_of(tmp_path, tokenizer, joined, train_on="last")
    with pytest.raises(DataError, match=r"row 1 of .*reads its turns as one text .* near .*the"):
        prompts_of(tmp_path, tokenizer, fine, joined)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([assistant("a"), user("b"), assistant("c")], "the first of `messages` is the assistant's"),
        ([user("b"), assistant("c"), user("d")], "the last of `messages` is by 'user'"),
    ],
)
def test_chats_without_a_place_to_begin_or_end(tmp_path, messages, message):
    with pytest.raises(DataError, match=f"row 0 .*: {message}"):
        prompts_of(tmp_path, family_tokenizer("chatml"), {"messages": messages}, train_on="all")


def test_a_chat_that_waits_for_an_answer_is_a_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    waiting = [user("b"), assistant("c"), user("d")]
    path.write_text(json.dumps({"messages": waiting}) + "\n")
    (example,) = load_examples(str(path))
    assert [message["content"] for message in example.prompt] == ["b", "c", "d"]
    assert example.completion is None
    with pytest.raises(DataError, match="has no completion"):
        prompts_of(tmp_path, family_tokenizer("chatml"), {"messages": waiting}, train_on="last")


def test_a_run_trains_on_all_turns(tmp_path):
    """The loss tokens of a step are those of the data's trained turns."""
    tokenizer = family_tokenizer("chatml")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": CHATS[0]}) + "\n")
    lengths = {}
    for train_on in ("last", "all"):
        recipe = tiny_recipe(
            tmp_path / train_on,
            data={"source": str(path), "num_prompts": None, "train_on": train_on},
            objective={"prefix": "dataset", "signal": "labels"},
            window={"tokens": 256},
            train={"steps": 1, "prompts_per_step": 1, "warmup_steps": 0},
        )
        student = make_tiny(tokenizer)
        potstill.train(recipe, student=student, tokenizer=tokenizer, quiet=True)
        (prompt,) = prompts_of(tmp_path, tokenizer, {"messages": CHATS[0]}, train_on=train_on)
        row = json.loads((tmp_path / train_on / "metrics.jsonl").read_text())
        lengths[train_on] = (row["num_loss_tokens"], sum(prompt.trained))
    assert all(logged == counted for logged, counted in lengths.values())
    assert lengths["all"] > lengths["last"]


def test_only_completions_of_the_data_have_turns():
    with pytest.raises(RecipeError, match=r"data\.train_on is set but not read: objective\.prefix"):
        make_recipe({"data": {"source": "a.jsonl", "train_on": "all"}})
