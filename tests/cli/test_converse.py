"""`potstill chat`: what the model is asked, what is printed while it writes, and how an answer and
the conversation end."""

import builtins
import io
import signal

import pytest
from odd_models import make_tiny, write_folder
from odd_tokenizers import family_tokenizer
from transformers import AutoTokenizer

from potstill.cli import chat
from potstill.cli.app import main
from potstill.config import Sampling
from potstill.console.printable import printable
from potstill.models import sampling
from potstill.models.language_model import load_model
from potstill.seeds import Stream, stream_key

GREEDY = ("--temperature", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a chat template, which ends its turns with <|im_end|>."""
    tokenizer = family_tokenizer("chatml")
    model = make_tiny(tokenizer, "qwen3")
    return write_folder(tmp_path_factory.mktemp("chat") / "model", tokenizer, model)


@pytest.fixture
def asked(monkeypatch):
    """The token ids of each prompt that a model is given, with what it wrote after them."""
    pairs = []

    def recorded(model, prompts, seeds, **options):
        pairs.append([prompts[0], None])
        found = sampling.sample(model, prompts, seeds, **options)
        pairs[-1][1] = found[0]
        return found

    monkeypatch.setattr(chat, "sample", recorded)
    return pairs


def talk(monkeypatch, capsys, model, text, *options):
    """Exit code, standard output and standard error, with a text on standard input."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code = 0
    try:
        main(["chat", str(model), *options])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rendered(folder, messages, **arguments):
    """As transformers renders a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **arguments
    )
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def by(role, content):
    return {"role": role, "content": content}


def test_turns_are_rendered_as_the_template_says(monkeypatch, capsys, folder, asked):
    options = ("--system", "Be short.", "--max-tokens", "6", "--seed", "3")
    options += ("--template-arguments.enable_thinking", "false")
    text = "Hello there\nAnd now?\n\n/new\nAgain\n/exit\nnever\n"
    code, out, err = talk(monkeypatch, capsys, folder, text, *options)
    assert code == 0 and "a new conversation" in err and len(asked) == 3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")]
    answers = []
    for place, (prompt, completion) in enumerate(asked):
        # The answer is that of sampling the same prompt without a stream.
        (alone,) = sampling.sample(
            load_model(str(folder)).model,
            [prompt],
            [stream_key((3, place, 0), Stream.CHAT)],
            max_tokens=6,
            end_ids=ends,
            sampling=Sampling(),
            vocab_size=len(tokenizer),
        )
        assert alone == completion
        ids = [i for i in completion.token_ids if i not in ends]
        answers.append(tokenizer.decode(ids, skip_special_tokens=True))
    system, told = by("system", "Be short."), {"enable_thinking": False}
    first = [system, by("user", "Hello there")]
    second = [*first, by("assistant", answers[0]), by("user", "And now?")]
    assert asked[0][0] == rendered(folder, first, **told)
    assert asked[1][0] == rendered(folder, second, **told)
    assert asked[2][0] == rendered(folder, [system, by("user", "Again")], **told)
    assert out == "".join(f"{printable(answer)}\n" for answer in answers)


def test_the_seed_decides(monkeypatch, capsys, folder):
    outs = [
        talk(monkeypatch, capsys, folder, "Hello\n", "--max-tokens", "8", "--seed", seed)[1]
        for seed in ("1", "1", "2")
    ]
    assert outs[0] == outs[1] != outs[2]


def test_it_stops_at_the_end_set_stored_with_the_model(
    monkeypatch, capsys, folder, asked, tmp_path
):
    _, _, err = talk(monkeypatch, capsys, folder, "Hello\n", *GREEDY, "--max-tokens", "12")
    assert "cut after 12 tokens; --max-tokens allows more" in err
    ids = asked[0][1].token_ids
    place = next(i for i in range(1, 12) if ids[i] not in ids[:i])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(str(folder))
    ends = [tokenizer.eos_token_id, ids[place]]
    ended = write_folder(tmp_path / "ended", tokenizer, model.model, ends)
    _, out, err = talk(monkeypatch, capsys, ended, "Hello\n", *GREEDY, "--max-tokens", "12")
    assert "cut" not in err and asked[1][1].token_ids == ids[: place + 1]
    # The end is no part of the answer, though this one is a token like others.
    shown = tokenizer.decode(ids[:place], skip_special_tokens=True)
    assert out == f"{printable(shown)}\n"


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, capsys, folder, asked):
    pieces = []

    def interrupt(text):
        if text:
            pieces.append(text)
        if len(pieces) == 3 and len(asked) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "say_on", interrupt)
    text = "Hello\nGo on\n"
    code, _, err = talk(monkeypatch, capsys, folder, text, "--max-tokens", "40", "--seed", "5")
    assert code == 0 and "(stopped)" in err and len(asked) == 2
    # The words up to there are part of the conversation.
    messages = [by("user", "Hello"), by("assistant", "".join(pieces[:3])), by("user", "Go on")]
    assert asked[1][0] == rendered(folder, messages)


def test_sigterm_ends_the_program(monkeypatch, capsys, folder):
    monkeypatch.setattr(chat, "say_on", lambda text: signal.raise_signal(signal.SIGTERM))
    code, _, err = talk(monkeypatch, capsys, folder, "Hello\nGo on\n", "--max-tokens", "40")
    assert code == 128 + signal.SIGTERM and "stopped" in err.splitlines()[-1]


def test_a_full_context_is_said(monkeypatch, capsys, folder, asked):
    length = load_model(str(folder)).context_length
    tokenizer = AutoTokenizer.from_pretrained(folder)
    long = "x?" * length
    num_around = len(rendered(folder, [by("user", "")]))
    fitting = long[: length - num_around - 4]
    num_ids = len(rendered(folder, [by("user", fitting)]))
    assert length - 8 < num_ids < length and len(tokenizer.encode(long)) > length
    text = f"{long}\n{fitting}\nmore\n/new\nHello\n"
    code, _, err = talk(monkeypatch, capsys, folder, text, "--max-tokens", "30", "--seed", "1")
    assert code == 0
    assert f"tokens and fills the context of {length}; /new begins anew; this turn is" in err
    assert f"cut: the context of {length} tokens is full; /new begins anew" in err
    # The first is left out, the second fills what is left, the third has no room.
    assert len(asked[0][0]) == num_ids and len(asked) == 2
    assert len(asked[0][1].token_ids) == length - num_ids
    assert asked[1][0] == rendered(folder, [by("user", "Hello")])


def test_a_model_without_a_template_completes_each_line(monkeypatch, capsys, asked):
    code, out, err = talk(monkeypatch, capsys, "potstill:teacher", "__12*3=\n__13*3=\n", *GREEDY)
    assert code == 0 and "has no chat template: each line is completed as plain text" in err
    tokenizer = load_model("potstill:teacher").tokenizer
    assert [prompt for prompt, _ in asked] == [
        tuple(tokenizer.encode(f"__{number}*3=")) for number in (12, 13)
    ]
    assert out.endswith("#39.\n") and out.count("\n") == 2
    for option in (("--system", "x"), ("--template-arguments.depth", "2")):
        code, out, err = talk(monkeypatch, capsys, "potstill:base", "", *option)
        assert code == 2 and out == "" and "is for a chat template" in err and err.count("\n") == 1


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_line_that_is_no_text_is_left_out(monkeypatch, capsys, folder, asked, is_chat):
    """Python reads a byte that is no UTF-8 as half of a pair where the locale is POSIX's."""
    model = folder if is_chat else "potstill:base"
    code, _, err = talk(monkeypatch, capsys, model, "1\udcff\n1*2=\n", "--max-tokens", "2")
    assert code == 0 and "at character" in err and "; this turn is left out" in err
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-tokens", "0"), "--max-tokens is 0; it must be at least 1"),
        (("--temperature", "-1"), "temperature is -1"),
        (("--template-arguments.messages", "1"), "'messages' is given to every template"),
    ],
)
def test_bad_options_are_refused_in_one_line(monkeypatch, capsys, folder, options, message):
    code, out, err = talk(monkeypatch, capsys, folder, "Hello\n", *options)
    assert code == 2 and out == "" and message in err.splitlines()[-1]


def test_at_a_terminal_lines_are_asked_for(monkeypatch, capsys, folder, asked):
    lines = iter(["Hello", KeyboardInterrupt, "Again", EOFError])

    def typed(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", typed)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    main(["chat", str(folder), "--max-tokens", "3"])
    assert len(asked) == 2 and capsys.readouterr().err.count("/exit or Ctrl-D ends") == 2


def pieces_of(monkeypatch, model, token_ids):
    """The pieces that are printed after each token, and at the end."""
    pieces = []
    monkeypatch.setattr(chat, "say_on", pieces.append)
    written = chat._Written(model)
    for token_id in token_ids:
        written.add(token_id)
    written.finish()
    return pieces


def test_characters_are_printed_whole(monkeypatch, folder):
    model = load_model(str(folder))
    text = "naïve 🙂 日本\n\t€ \u200d."
    ids = model.tokenizer.encode(text)
    pieces = pieces_of(monkeypatch, model, ids)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(text) and sum(map(bool, pieces)) > 10
    # Bytes that are no character: printed when that is known, the last ones at the end.
    euro = model.tokenizer.encode("€")
    broken = [*euro[:2], *ids, *euro[:1]]
    pieces = pieces_of(monkeypatch, model, broken)
    assert "".join(pieces) == model.tokenizer.decode(broken, clean_up_tokenization_spaces=False)
    assert pieces[0] == pieces[1] == "" and pieces[-1] == "\ufffd"


def test_what_a_model_writes_steers_no_terminal(monkeypatch, capsys, folder):
    model = load_model(str(folder))
    written = chat._Written(model)
    for token_id in model.tokenizer.encode("a\x1b[2Jb\u202ec\rd"):
        written.add(token_id)
    written.finish()
    assert capsys.readouterr().out == "a\\u001b[2Jb\\u202ec\\u000dd\n"


def test_tokens_are_told_as_they_are_drawn(folder):
    model = load_model(str(folder))
    prompts = [(5, 6, 7), (8,), (9, 10)]
    told = {0: [], 1: [], 2: []}
    written = sampling.sample(
        model.model,
        prompts,
        [(i,) for i in range(3)],
        max_tokens=(4, 9, 6),
        end_ids=model.end_ids,
        sampling=Sampling(batch_size=2),
        on_token=lambda place, token_id: told[place].append(token_id),
    )
    assert [tuple(ids) for ids in told.values()] == [each.token_ids for each in written]
