"""Chat data as its template writes it: messages whole, one end, the assistant's turns trained on,
else a refusal."""

import copy
import json
import logging
import os

import pytest
from conftest import interrupted_at, tiny_recipe
from odd_models import make_tiny, write_folder
from odd_tokenizers import R1, chat_template, family_tokenizer, metaspace_tokenizer

import potstill
from potstill import build_cache
from potstill.answers.grading import Grader
from potstill.cli.app import main
from potstill.config import Evaluation
from potstill.evaluation.scores import prepare_problems
from potstill.models import templates
from potstill.models.language_model import LanguageModel, ModelError, find_end_ids
from potstill.models.templates import ChatTemplate, Conversation, as_parts, text_of
from potstill.prompts.examples import load_examples, make_prompts, prompt_notes
from potstill.training import setup
from potstill.types import DataError

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {}},
    },
}
RESULT = {"role": "tool", "content": "4"}
IT_IS = {"role": "assistant", "content": "It is 4"}
TEMPLATES = [
    *(
        "cohere2",
        "deepseek_r1_distill",
        "gemma3",
        "glm4moe",
        "gptoss",
        "idefics3",
        "lfm2",
        "llama3_1",
        "llama3_2",
    ),
    *(
        "llava_next",
        "nemotron_3_nano",
        "phi3_5",
        "qwen2_5",
        "qwen3",
        "qwen3_5_think",
        "qwen3_training",
        "smolvlm",
    ),
]


class NoModel:
    """The attributes that `find_end_ids` reads, of a model that says nothing of ends."""

    generation_config = None


def examples_of(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(path))


def prompts_of(tmp_path, tokenizer, *rows, end_ids=(), **options):
    options = {"template": None, "max_completion": 8, "context_length": None} | options
    ends = None if end_ids is None else (*end_ids, *find_end_ids(NoModel(), tokenizer))
    return make_prompts(examples_of(tmp_path, *rows), tokenizer, end_ids=ends, **options)


def shown(tokenizer, prompt):
    """The prompt, and the completion with what is not trained on in brackets."""
    text, was_trained = "", True
    for i, is_trained in zip(prompt.completion_ids or (), prompt.trained or (), strict=True):
        text += (
            "" if is_trained == was_trained else "]" if is_trained else "["
        ) + tokenizer.decode([i])
        was_trained = is_trained
    return tokenizer.decode(prompt.token_ids), text


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    """Open, closed and continued, with tools and arguments; templates that want parts get them."""
    tokenizer = family_tokenizer("plain")
    tokenizer.chat_template = chat_template(name)
    template = ChatTemplate(tokenizer, {"enable_thinking": False})

    def given(messages):
        if not template.wants_parts:
            return messages
        return [
            message | {"content": [{"type": "text", "text": message["content"]}]}
            for message in messages
        ]

    for ending, messages, option in [
        ("open", [HI], {"add_generation_prompt": True}),
        (
            "open",
            [HI, HELLO, {"role": "user", "content": "And «x» \n"}],
            {"add_generation_prompt": True},
        ),
        ("closed", [HI, HELLO | {"reasoning_content": "a wish"}], {}),
        (
            "continued",
            [HI, {"role": "assistant", "content": "The answer is "}],
            {"continue_final_message": True},
        ),
    ]:
        tools = [TOOL] if ending == "open" else None
        theirs = tokenizer.apply_chat_template(
            given(messages), tools=tools, tokenize=False, enable_thinking=False, **option
        )
        ours = template.render([Conversation(messages, tools, ending)])[0]
        assert ours == theirs


def test_what_closes_a_turn():
    """The template's own mark, in the middle and at the end; no mark found is no end."""
    for family, last, middle in [
        ("chatml", "<|im_end|>", "<|im_end|>"),
        ("gemma", "<end_of_turn>", "<end_of_turn>"),
        ("llama", "<|eot_id|>", "<|eot_id|>"),
        ("smolvlm", "<end_of_utterance>", "<end_of_utterance>"),
        ("gpt-oss", "<|return|>", "<|end|>"),
        ("r1", R1[-1], R1[-1]),
    ]:
        tokenizer = family_tokenizer(family)
        template = ChatTemplate(tokenizer)
        assert tokenizer.convert_ids_to_tokens([template.end_id, template.middle_end_id]) == [
            last,
            middle,
        ]
        assert find_end_ids(NoModel(), tokenizer) == tuple(
            dict.fromkeys((tokenizer.eos_token_id, template.end_id))
        )
    for text in (
        "{{ bos_token }}{{ messages[0].role }}",
        "{{ raise_exception('no') }}",
        "{% if %}",
    ):
        tokenizer.chat_template = text
        assert ChatTemplate(tokenizer).end_id is None


@pytest.mark.parametrize(
    ("family", "row", "prompt", "completion"),
    [
        ("gemma", {"messages": [HI, HELLO]}, "<start_of_turn>model\n", "Hello<end_of_turn>"),
        (
            "chatml",
            {"messages": [HI, HELLO]},
            "assistant\n",
            "<think>\n\n</think>\n\nHello<|im_end|>",
        ),
        (
            "smolvlm",
            {"messages": [HI, HELLO]},
            "User: Hi<end_of_utterance>\nAssistant:",
            " Hello<end_of_utterance>",
        ),
        # A string is taken as it is; its own end is one end.
        (
            "chatml",
            {"prompt": [HI], "completion": "Hello<|im_end|><|endoftext|>"},
            "assistant\n",
            "Hello<|im_end|>",
        ),
        (
            "r1",
            {"prompt": [HI], "completion": "Hm.</think>Hello"},
            "<think>\n",
            f"Hm.</think>Hello{R1[-1]}",
        ),
        # The template writes what it is given beside content, and texts in parts.
        (
            "chatml",
            {
                "messages": [
                    HI,
                    {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
                ]
            },
            "assistant\n",
            "<think>\ntwo and two\n</think>\n\n4<|im_end|>",
        ),
        (
            "chatml",
            {"messages": [HI, CALLS, RESULT, IT_IS], "tools": json.dumps([TOOL])},
            '{"name": "add", "arguments": {"a": 2, "b": '
            "2}}\n</tool_call><|im_end|>\n<|im_start|>user\n"
            "<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nIt is 4<|im_end|>",
        ),
        (
            "chatml",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HELLO]},
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nHello<|im_end|>",
        ),
        # The assistant's messages are trained on, each up to its own end.
        (
            "chatml",
            {"prompt": [HI], "completion": [CALLS, RESULT, IT_IS]},
            "<|im_start|>assistant\n",
            '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": '
            "2}}\n</tool_call><|im_end|>[\n<|im_start|>user\n"
            "<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n]<think>\n\n</think>\n\n"
            "It is 4<|im_end|>",
        ),
        (
            "gpt-oss",
            {"prompt": [HI], "completion": [HELLO, HI, HELLO]},
            "<|start|>assistant",
            "<|channel|>final<|message|>Hello<|end|>[<|start|>user<|message|>Hi<|end|><|start|>assistant]"
            "<|channel|>final<|message|>Hello<|return|>",
        ),
        (
            "gpt-oss",
            {"messages": [HI, HELLO | {"thinking": "Hm"}]},
            "<|start|>assistant",
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hello<|return|>",
        ),
        # The assistant's last words in a prompt go on.
        (
            "gemma",
            {"prompt": [HI, HELLO], "completion": " you"},
            "<start_of_turn>model\nHello",
            " you<end_of_turn>",
        ),
        (
            "gemma",
            {"prompt": [HI, HELLO], "completion": [{"role": "assistant", "content": " you"}]},
            "<start_of_turn>model\nHello",
            " you<end_of_turn>",
        ),
        # Raw text ends as it does itself, else as a document.
        ("plain", {"prompt": "The loss is", "completion": " one"}, "The loss is", " one</s>"),
        (
            "plain",
            {"prompt": "The loss is", "completion": " one</s></s>"},
            "The loss is",
            " one</s>",
        ),
        ("plain", {"prompt": "Hi", "completion": [HELLO]}, "Hi", "Hello</s>"),
        ("chatml", {"prompt": "Hi", "completion": "Hello<|im_end|>"}, "Hi", "Hello<|im_end|>"),
    ],
)
def test_a_completion_is_what_the_template_writes_after_the_prompt(
    tmp_path, family, row, prompt, completion
):
    tokenizer = family_tokenizer(family)
    (made,) = prompts_of(tmp_path, tokenizer, row)
    before, after = shown(tokenizer, made)
    assert before.endswith(prompt) and after == completion
    if "messages" in row:
        texts = [message | {"content": text_of(message)} for message in row["messages"]]
        whole = tokenizer.apply_chat_template(
            [m | {"content": as_parts(m["content"])} for m in texts]
            if family == "smolvlm"
            else texts,
            tools=[TOOL] if "tools" in row else None,
            tokenize=False,
        )
        assert whole.startswith(before + after) and not whole[len(before + after) :].strip()


@pytest.mark.parametrize(
    ("family", "row", "message"),
    [
        (
            "gemma",
            {"messages": [HI, HI, HELLO]},
            "the chat template refuses: Conversation roles must alternate",
        ),
        (
            "gemma",
            {"messages": [HI, HELLO | {"reasoning_content": "a wish"}]},
            "drops the reasoning of message 1",
        ),
        ("gemma", {"messages": [HI, HELLO], "tools": [TOOL]}, "drops the tool 'add'"),
        (
            "gemma",
            {"prompt": [HI], "completion": [CALLS, HI, HELLO]},
            "drops the tool call of message 1",
        ),
        (
            "r1",
            {"messages": [HI, HELLO]},
            r"writes '<think>\\n' before an answer .* give the completion as a string",
        ),
        (
            "r1",
            {"messages": [HI, {"role": "assistant", "content": "Hm.</think>Yes"}]},
            "drops the content of message 1",
        ),
        ("chatml", {"prompt": [HI], "completion": [HI]}, "begins or ends with a message by 'user'"),
        (
            "chatml",
            {"prompt": [HI], "completion": [CALLS, RESULT]},
            "begins or ends with a message by 'tool'",
        ),
        (
            "plain",
            {"prompt": "Hi", "completion": [HELLO, HI, HELLO]},
            "its completion is of several messages",
        ),
        ("plain", {"prompt": "Hi", "completion": " one</s> and two"}, "goes on after an end token"),
        ("chatml", {"prompt": [HI], "completion": "a<|im_end|>\n"}, "goes on after an end token"),
        (
            "chatml",
            {"prompt": [{"role": "user", "content": None}]},
            "`content` of a message by 'user' is None",
        ),
        (
            "chatml",
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "a list of text parts",
        ),
        (
            "plain",
            {"prompt": "Hi", "completion": "a", "tools": [TOOL]},
            "has tools and is taken as it is, so no model would read them",
        ),
        ("chatml", {"prompt": [HI], "tools": "{"}, "`tools` is '{'; give a list of JSON schemas"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_row(tmp_path, family, row, message):
    with pytest.raises(DataError, match=r"row 1 of .*rows\.jsonl'.*" + message) as error:
        prompts_of(
            tmp_path,
            family_tokenizer(family),
            {"prompt": [HI], "completion": "Hello"}
            if family != "plain"
            else {"prompt": "a", "completion": "b"},
            row,
        )
    assert "\n" not in str(error.value)


def test_a_prompt_has_one_start_and_no_end(tmp_path):
    tokenizer = family_tokenizer("plain", adds_bos=True, adds_eos=True)
    assert tokenizer.decode(tokenizer.encode("One file")) == "<s>One file</s>"
    rows = [{"prompt": "One file"}, {"prompt": "<s>The loss is"}]
    prompts = prompts_of(tmp_path, tokenizer, *rows, end_ids=None)
    assert [tokenizer.decode(p.token_ids) for p in prompts] == ["<s>One file", "<s>The loss is"]
    (note,) = prompt_notes(2, prompts, tokenizer, None)
    assert note == "warning: 1 prompts begin with <s> already; the tokenizer's own is not added"


def test_a_completion_begins_without_the_space_that_texts_begin_with(tmp_path):
    """The tokens of a prompt and its completion are those of the two in one text."""
    tokenizer = metaspace_tokenizer()
    for completion in ("36", " 36", "one file"):
        (prompt,) = prompts_of(tmp_path, tokenizer, {"prompt": "12*3=", "completion": completion})
        whole = tokenizer.decode(prompt.token_ids + prompt.completion_ids)
        assert whole == f"12*3={completion}</s>"
    assert tokenizer.decode([*tokenizer.encode("12*3="), *tokenizer.encode("36")]) == "12*3= 36"


def test_templates_are_told_arguments(tmp_path):
    tokenizer = family_tokenizer("chatml")
    row = {"messages": [HI, HELLO]}
    (prompt,) = prompts_of(tmp_path, tokenizer, row, template_arguments={"enable_thinking": False})
    before, after = shown(tokenizer, prompt)
    assert (
        before.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        and after == "Hello<|im_end|>"
    )
    (note,) = prompt_notes(
        1, [prompt], tokenizer, None, {"enable_thinkin": False, "enable_thinking": False}
    )
    assert note == "warning: the chat template reads no argument 'enable_thinkin'"
    settings = Evaluation(
        source="multiplication",
        num_problems=1,
        template="chat",
        template_arguments={"enable_thinking": False},
    )
    (problem,) = prepare_problems(LanguageModel(make_tiny(tokenizer), tokenizer, "tiny"), settings)[
        2
    ]
    assert tokenizer.decode(problem.token_ids).endswith("<think>\n\n</think>\n\n")
    with pytest.raises(DataError, match="'messages' is given to every template"):
        prompts_of(tmp_path, tokenizer, row, template_arguments={"messages": []})


def test_prompts_that_are_too_long(tmp_path):
    tokenizer = family_tokenizer("plain", adds_bos=True)
    rows = [{"prompt": text} for text in ("abc", "abcdefghij", "xyz", "0123456789")]
    options = {"end_ids": None, "max_completion": 4, "context_length": 9}
    with pytest.raises(
        DataError, match=r"prompt '1' .* has 11 tokens.*\(2 of 4 prompts are too long\)"
    ):
        prompts_of(tmp_path, tokenizer, *rows, **options)
    with pytest.raises(DataError, match=r"has 4 tokens, more than data.max_prompt_tokens = 3"):
        prompts_of(tmp_path, tokenizer, *rows[:1], **options, max_prompt_tokens=3)
    kept = prompts_of(tmp_path, tokenizer, *rows, **options, too_long="drop")
    assert [prompt.example.prompt for prompt in kept] == ["abc", "xyz"]
    assert prompt_notes(4, kept, tokenizer, None) == [
        "warning: 2 of 4 prompts are too long and left out"
    ]
    cut = prompts_of(
        tmp_path, tokenizer, *rows, **options, too_long="cut-left", max_prompt_tokens=4
    )
    assert [tokenizer.decode(prompt.token_ids) for prompt in cut] == [
        "<s>abc",
        "<s>hij",
        "<s>xyz",
        "<s>789",
    ]
    assert prompt_notes(4, cut, tokenizer, None) == [
        "warning: 2 of 4 prompts are too long and lost tokens at their beginning"
    ]
    with pytest.raises(DataError, match="all 1 prompts are too long"):
        prompts_of(tmp_path, tokenizer, rows[1], **options, too_long="drop")


def test_a_long_prompt_is_spoken_of_by_us_alone(tmp_path, caplog):
    tokenizer = family_tokenizer("plain")
    tokenizer.model_max_length = 4
    options = {"end_ids": None, "max_completion": 4, "context_length": None}
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        prompts_of(tmp_path, tokenizer, {"prompt": "abcdefghij"}, **options)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 3000000000 }}", "needs more than 1,024 MiB"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 0.5 s",
        ),
        ("{% set n = 9 ** 9 ** 9 %}{{ n ** n }}", "takes more than 0.5 s"),
        ("{{ 'ab' * 9999999 }}", "writes more than 16,777,216 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses: maximum recursion depth"),
        ("{{ ''.__class__.__mro__ }}", "refuses: access to attribute '__class__'"),
        ("{{ namespace(_x=1) }}", "refuses: a namespace may not hold the name '_x'"),
        ("{% if %}", "refuses: Expected an expression"),
        ("{{ messages[0].content.nothing() }}", "refuses: 'str object' has no attribute 'nothing'"),
    ],
)
def test_hostile_templates_end_in_one_line(tmp_path, monkeypatch, template, message):
    """And those that meet a limit already when the model is loaded; the next template is rendered
    as ever."""
    monkeypatch.setattr(templates, "CONVERSATION_SECONDS", 0.5)
    tokenizer = family_tokenizer("plain")
    tokenizer.chat_template = template
    if not message.startswith("refuses"):
        with pytest.raises(ModelError, match=f"the chat template of .* {message}"):
            find_end_ids(NoModel(), tokenizer)
    else:
        with pytest.raises(DataError, match=f"prompt '0' .*: the chat template {message}"):
            prompts_of(tmp_path, tokenizer, {"prompt": [HI], "completion": "a"})
    tokenizer.chat_template = "{{ messages[0].content }}!"
    assert ChatTemplate(tokenizer).render([Conversation([HI])] * 600) == ["Hi!"] * 600


def test_files_of_the_current_folder_are_not_run(tmp_path, monkeypatch):
    """As in the folder of a model that came from elsewhere; both kinds of processes answer as
    ever."""
    for name in ("jinja2", "json", "datetime", "selectors"):
        (tmp_path / f"{name}.py").write_text("open('was-run', 'w').close()\nraise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    templates._worker(os.getpid()).close()
    tokenizer = family_tokenizer("plain")
    tokenizer.chat_template = "{{ messages[0].content }}!"
    assert ChatTemplate(tokenizer).render([Conversation([HI])]) == ["Hi!"]
    with Grader(num_workers=1) as grader:
        assert [grade.score for grade in grader.grade(["1/2"], ["\\boxed{0.5}"])] == [1]
    assert not (tmp_path / "was-run").exists()


def test_the_date_that_templates_write_stays_with_the_run_and_the_cache(tmp_path, monkeypatch):
    """A run that is stopped, and a cache, go on on another day with the prompts of the first."""
    days = iter(f"2026-11-{day}" for day in range(10, 30))
    monkeypatch.setattr(templates, "today", lambda: next(days))
    monkeypatch.setattr(setup, "today", templates.today)
    rows = [{"messages": [HI | {"content": text}, HELLO]} for text in ("Hi", "Yo", "Ha", "Ho")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = family_tokenizer("llama")
    models = {
        name: make_tiny(tokenizer, seed=seed) for seed, name in enumerate(("student", "teacher"))
    }
    data = {"source": str(tmp_path / "rows.jsonl"), "num_prompts": None}

    def run(name, **sections):
        given = {
            "tokenizer": tokenizer,
            "student": copy.deepcopy(models["student"]),
            "teacher": models["teacher"],
        }
        window = {"tokens": 4}
        return potstill.train(
            tiny_recipe(tmp_path / name, data=data, window=window, **sections), **given, quiet=True
        )

    with interrupted_at(3):
        run("run")
    run("run")
    begun = json.loads((tmp_path / "run/environment.json").read_text())["date"]
    prompt = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[-1])["prompt"]
    assert begun[:8] == "2026-11-" and f"Today Date: {begun[8:]} Nov 2026" in prompt
    recipe = tiny_recipe(tmp_path / "none", data=data, window={"tokens": 4})
    for num in (2, 4):
        few = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"num_prompts": num})}
        )
        manifest = build_cache(few, tmp_path / "cache", **models, tokenizer=tokenizer, quiet=True)
    assert manifest.total("num_rollouts") == 4
    run(
        "cached",
        teacher={"cache": str(tmp_path / "cache")},
        objective={"prefix": "teacher", "kl": "forward"},
    )
    assert (
        json.loads((tmp_path / "cached/environment.json").read_text())["date"]
        == manifest.date
        != begun
    )


def test_labels_teach_the_turn_end(tmp_path):
    """Fifty steps of cross-entropy on one answer: greedily written, it ends with what closes
    turns."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [HI, HELLO]}) + "\n")
    tokenizer = family_tokenizer("gemma")
    student = make_tiny(tokenizer)
    recipe = tiny_recipe(
        tmp_path / "run",
        data={"source": str(tmp_path / "rows.jsonl"), "num_prompts": None},
        objective={"prefix": "dataset", "signal": "labels"},
        train={"steps": 50, "prompts_per_step": 1, "lr": 3e-3, "checkpoint_every": 50},
    )
    potstill.train(recipe, student=student, tokenizer=tokenizer, quiet=True)
    ids = tokenizer.apply_chat_template([HI], add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    written = student.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=[1, 4])
    assert tokenizer.decode(written[0, ids.shape[1] :]) == "Hello<end_of_turn>"


def test_the_command_line_tells_templates_arguments(tmp_path, capsys):
    folder = write_folder(
        tmp_path / "model", tokenizer := family_tokenizer("chatml"), make_tiny(tokenizer)
    )
    options = [
        "--template",
        "chat",
        "--max-tokens",
        "2",
        "--num",
        "1",
        "--template-arguments.enable_thinking",
        "false",
    ]
    main(["sample", str(folder), "--prompt", "Hi", *options])
    assert "<think>\n\n</think>" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["sample", str(folder), "--prompt", "Hi", *options, "--train.steps", "3"])
    assert "--train.steps is a field of a recipe" in capsys.readouterr().err
