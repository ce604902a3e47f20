"""Bad inputs: exit 2, exactly one line on standard error, no traceback, nothing written. The table:
bad_inputs.py."""

import gzip
import json
import shlex
import shutil
import socket
import time

import pytest
import torch
from bad_inputs import COMMANDS, RECIPES, STUDIES
from conftest import make_model, tiny_recipe
from safetensors.torch import load_file, save_file
from sampled import some
from synthetic_runs import evaluate as evaluated
from synthetic_runs import write_run

from potstill import Recipe, build_cache, evaluate, hub, train
from potstill.cli.app import main
from potstill.config import Evaluation, RecipeError
from potstill.models.language_model import ASSETS, ModelError
from potstill.types import DataError


@pytest.fixture(scope="module")
def yard(tmp_path_factory):
    """A folder with things that are not what they seem."""
    folder = tmp_path_factory.mktemp("yard")
    (folder / "a-file").write_text("not what you think")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "full" / "model").mkdir()
    write_run(folder / "done-run", evaluated(0, 0.5))
    torn = write_run(folder / "torn-run", evaluated(0, 0.5))
    (torn / "DONE").unlink()
    (torn / "metrics.jsonl").write_text('{"step": 1\n')
    for name, data in {
        "bad.json": b"{",
        "latin.json": '["é"]'.encode("latin-1"),
        "list.json": b"[1, 2]",
        "empty.jsonl": b"",
        "blank.jsonl": b"\n\n\n",
        "torn.jsonl": b'{"prompt": "12*3="}\n{"prompt": "1',
        "list.jsonl": b"[1, 2]\n",
        "latin.jsonl": '{"prompt": "é"}\n'.encode("latin-1"),
        "utf16.jsonl": '{"prompt": "a"}\n'.encode("utf-16"),
        "deep.jsonl": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "bomb.jsonl.gz": gzip.compress(b'{"prompt": "a"}\n')[:-9],
        "no-prompt.jsonl": b'{"question": "a"}\n',
        "null-prompt.jsonl": b'{"prompt": null}\n',
        "number-prompt.jsonl": b'{"prompt": 3}\n',
        "empty-prompt.jsonl": b'{"prompt": ""}\n',
        "bad-message.jsonl": b'{"prompt": [{"role": "user"}]}\n',
        "chat.jsonl": b'{"prompt": [{"role": "user", "content": "12*3="}]}\n',
        "prompts.md": b"12*3=\n",
        "not.parquet": b"PAR1 but no more",
        "good.jsonl": b'{"prompt": "__12*3="}\n{"prompt": "__13*3="}\n',
        "table.jsonl": b'{"prompt": "__12*3="}\n',
    }.items():
        (folder / name).write_bytes(data)
    for name, change in DAMAGES.items():
        change(shutil.copytree(ASSETS / "base", folder / "models" / name))
    return folder


def _config(**changes):
    def change(folder):
        settings = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(settings))

    return change


def _write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def _only_pickle(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _without_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "layers.0.mlp" not in name},
        folder / "model.safetensors",
    )


# Copies of a good model, each with one thing wrong.
DAMAGES = {
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "config-list": _write("config.json", b"[]"),
    "config-text": _write("config.json", b"hello"),
    "no-weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:9999]
    ),
    "text-weights": _write(
        "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    ),
    "pickle": _only_pickle,
    "other-size": _config(hidden_size=32),
    "no-layer": _without_a_layer,
    "negative": _config(num_hidden_layers=-1),
    "no-vocabulary": _config(vocab_size=0),
    "bad-tokenizer": _write("tokenizer.json", b"{}"),
    "unknown-type": _config(model_type="future9"),
}


def refused(yard, monkeypatch, capfd, arguments, message):
    """Run a command in this process and check how it is refused."""
    monkeypatch.chdir(yard)
    before = sorted((path, path.lstat().st_mtime_ns) for path in yard.rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("potstill: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert len(err) < 700 and all(c.isprintable() for c in err[:-1])
    assert message.lower() in err.lower(), err
    assert sorted((path, path.lstat().st_mtime_ns) for path in yard.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"), some([row for row in RECIPES if row[1] is not None], every=8)
)
def test_bad_recipes(tmp_path, yard, monkeypatch, capfd, text, message):
    (tmp_path / "r.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(yard, monkeypatch, capfd, ["train", str(tmp_path / "r.toml")], message)


@pytest.mark.parametrize(("line", "message"), some(COMMANDS, every=8))
def test_bad_commands(yard, monkeypatch, capfd, line, message):
    refused(yard, monkeypatch, capfd, shlex.split(line), message)


@pytest.mark.parametrize(("text", "message"), some(STUDIES, every=8))
def test_bad_studies(tmp_path, yard, monkeypatch, capfd, text, message):
    (tmp_path / "s.toml").write_text(text)
    # The processor's time: the clock's says how busy the machine is.
    started = time.process_time()
    refused(yard, monkeypatch, capfd, ["study", str(tmp_path / "s.toml")], message)
    assert time.process_time() - started < 20


def headless(model):
    model.get_output_embeddings = lambda: None
    return model


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda r, m: Recipe(otu=1),
            RecipeError,
            "otu is not a field of the recipe; the nearest is out",
        ),
        (lambda r, m: Recipe(train={"steps": "2"}), RecipeError, "train.steps is '2'"),
        (lambda r, m: Evaluation(num_problems=0), RecipeError, "num_problems is 0"),
        (lambda r, m: train("demo"), RecipeError, "the recipe is 'demo'; give a Recipe"),
        (
            lambda r, m: train(None),
            RecipeError,
            "give a Recipe, such as load_recipe",
        ),
        (lambda r, m: build_cache("demo", "c"), RecipeError, "give a Recipe"),
        (lambda r, m: train(r, student=m.model), ModelError, "tokenizer"),
        (lambda r, m: train(r, student=3), ModelError, "int"),
        (lambda r, m: train(r, student=torch.nn.Linear(2, 2)), ModelError, "Linear"),
        (
            lambda r, m: train(r, student=headless(m.model), tokenizer=m.tokenizer),
            ModelError,
            "head",
        ),
        (lambda r, m: train(r, student="no/such/folder"), ModelError, "does not exist"),
        (lambda r, m: train(r, prompts="12*3="), DataError, "prompts is the string"),
        (lambda r, m: train(r, prompts=3), DataError, "prompts"),
        (lambda r, m: train(r, prompts=[]), DataError, "empty"),
        (lambda r, m: train(r, prompts=[3]), DataError, r"prompts\[0\] is 3"),
        (lambda r, m: train(r, prompts=[None]), DataError, r"prompts\[0\] is None"),
        (lambda r, m: train(r, prompts=[""]), DataError, "prompt"),
        (lambda r, m: train(r, prompts=[{"question": "a"}]), DataError, "has no column 'prompt'"),
        (lambda r, m: evaluate(None, Evaluation(source="multiplication")), ModelError, "NoneType"),
        (
            lambda r, m: evaluate("potstill:base", Evaluation()),
            RecipeError,
            "evaluation.source is None",
        ),
        (lambda r, m: evaluate("potstill:base", None), RecipeError, "give an Evaluation"),
        (
            lambda r, m: evaluate(m.model, Evaluation(source="multiplication")),
            ModelError,
            "tokenizer",
        ),
    ],
)
def test_bad_calls_from_python(tmp_path, monkeypatch, call, kind, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message) as error:
        call(tiny_recipe("run"), make_model())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_hub_that_does_not_answer_is_tried_once(yard, monkeypatch, capfd):
    """Models and data sets are refused by one line each where a server says nothing."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.is_reachable.cache_clear()
        refused(yard, monkeypatch, capfd, ["sample", "some/model"], "the hub does not answer")
        source = ["--data.source", "some/data", "--out", "no-run"]
        refused(yard, monkeypatch, capfd, ["train", "demo", *source], "the hub does not answer")
        assert hub.HUB_SECONDS < 5
        # Nobody took the one call, so it still waits, and there is no second.
        server.setblocking(False)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()
    hub.is_reachable.cache_clear()


def test_good_inputs_beside_the_bad(yard, monkeypatch, capfd):
    """The inputs that the table damages are good without the damage."""
    monkeypatch.chdir(yard)
    shutil.copytree(ASSETS / "base", yard / "models" / "good", dirs_exist_ok=True)
    main(["train", "demo", "--student.model", "models/good", "--dry-run"])
    main(["sample", "models/good", "--num", "1", "--max-tokens", "2"])
