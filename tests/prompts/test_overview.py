"""The start table and the first prompt: numbers counted by hand and by numpy, in 100 columns."""

import json
import random

import numpy as np
import pytest
from odd_tokenizers import family_tokenizer

from potstill.config import make_recipe
from potstill.prompts.overview import first_prompt, length_table, marked, quantile
from potstill.prompts.prepare import prepare_prompts
from potstill.types import Example, Prompt


def prompt_of(length, source=0, **more):
    example = Example(id="a", prompt="p", source=source)
    return Prompt(example=example, token_ids=tuple(range(length)), **more)


@pytest.mark.parametrize("num", [1, 2, 19, 20, 21, 100])
def test_quantiles_are_numpys(num):
    lengths = [random.Random(num).randrange(1000) for _ in range(num)]
    for share in (0.5, 0.95):
        assert quantile(lengths, share) == np.percentile(
            lengths, 100 * share, method="inverted_cdf"
        )


def test_a_table_by_hand():
    """Three sources, two prompts dropped, one cut; a completion of 9 tokens in a window of 8."""
    kept = [
        prompt_of(4, 0, completion_ids=(1,) * 9, trained=(True,) * 9, teacher_ids=(1,) * 7),
        prompt_of(6, 0, completion_ids=(1,) * 2, trained=(True,) * 2, teacher_ids=(1,) * 9),
        prompt_of(1200, 1, completion_ids=(1,), trained=(True,), num_cut=3),
    ]
    dropped = [Example(id="b", prompt="p", source=source) for source in (0, 2)]
    examples = [prompt.example for prompt in kept] + dropped
    lines = length_table(["a.jsonl", "b.csv", "c.txt"], examples, kept, window=8)
    assert [line.split() for line in lines[1:]] == [
        ["number", "dropped", "cut", "min", "median", "95", "%", "max"],
        ["a.jsonl", "2", "1", "0", "4", "4", "6", "6"],
        ["b.csv", "1", "0", "1", "1,200", "1,200", "1,200", "1,200"],
        ["c.txt", "0", "1", "0"],
        ["all", "3", "2", "1", "4", "6", "1,200", "1,200"],
        ["as", "the", "teacher", "reads", "them", "3", "7", "9", "1,200", "1,200"],
        ["their", "completions", "3", "1", "1", "2", "9", "9"],
    ]
    ends = [len(line) for line in lines[1:] if line.endswith(("max", "0", "9", "6"))]
    assert len(set(ends)) <= 2


def test_it_fits_100_columns_whatever_its_names():
    names = [f"a/very/long/path/of/many/folders/number-{i}/\x1b[31mdata.jsonl" for i in range(30)]
    prompts = [prompt_of(10**6, source) for source in range(30)]
    lines = length_table(names, [prompt.example for prompt in prompts] * 1000, prompts, window=8)
    assert max(map(len, lines)) <= 100 and len(lines) == 2 + 8 + 2
    assert "\x1b" not in "".join(lines) and any("22 other sources" in line for line in lines)


def test_the_first_prompt_and_its_loss_tokens(tmp_path):
    tokenizer = family_tokenizer("chatml")
    messages = [
        {"role": role, "content": text}
        for role, text in [
            ("user", "Hi"),
            ("assistant", "Hello"),
            ("user", "A"),
            ("assistant", "B"),
        ]
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    recipe = make_recipe(
        {
            "data": {"source": str(tmp_path / "rows.jsonl"), "train_on": "all"},
            "objective": {"prefix": "dataset", "signal": "labels"},
            "window": {"tokens": 256},
        }
    )

    class Model:
        """The attributes of a model that the preparing of prompts reads."""

        context_length = None

    Model.tokenizer = tokenizer
    prompts, notes = prepare_prompts(recipe, Model, None, end_ids=(0,), date="2026-01-01")
    assert notes[0] == "prompts, with lengths in tokens:"
    assert notes[2].split()[1:] == ["1", "0", "0", *[str(len(prompts[0].token_ids))] * 4]
    lines = first_prompt(prompts, tokenizer, window=256)
    assert max(map(len, lines)) <= 100
    assert (
        lines[0]
        == "first of 1 prompts: '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'"
    )
    assert lines[1] == "its completion, loss tokens between ⟦ and ⟧:"
    shown = "".join(line[2:] for line in lines[2:])
    assert shown == (
        r"'⟦Hello<|im_end|>⟧\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"
        r"⟦<think>\n\n</think>\n\nB<|im_end|>⟧'"
    )
    cut = first_prompt(prompts, tokenizer, window=2)
    assert cut[1].startswith("its completion (its first 2 tokens), loss tokens between ⟦ and ⟧: '⟦")


def test_what_is_hidden_is_written_out():
    class Letters:
        """Each token is its character."""

        @staticmethod
        def decode(token_ids):
            return "".join(map(chr, token_ids))

    text = "\x1b[2J" + "a" * 600 + "\u202e" + "end"
    prompt = Prompt(
        example=Example(id="a", prompt="p"),
        token_ids=tuple(map(ord, text)),
        teacher_ids=(ord("T"),),
    )
    lines = first_prompt([prompt], Letters, Letters)
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in "".join(lines) and "\u202e" not in "".join(lines)
    shown = "".join(line[2:] for line in lines[1:-1])
    assert shown.startswith("'\\x1b[2Jaaa") and shown.endswith("\\u202eend'")
    assert "[... 208 characters ...]" in shown and lines[-1] == "the teacher reads: 'T'"
    assert marked((97, 98, 99), (False, True, True), Letters) == "a⟦bc⟧"
