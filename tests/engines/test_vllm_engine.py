"""vLLM as an engine, against a server that speaks as it does and fails as it is told."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from fake_servers import as_program, by_model, calls, serving, told
from safetensors.torch import load_file

from potstill.config import EngineSpec, Sampling
from potstill.engines import calls as server_calls
from potstill.engines import shared, vllm
from potstill.engines.entropies import with_entropies
from potstill.engines.make import refuse_missing_program
from potstill.engines.native import NativeEngine
from potstill.engines.protocol import EngineError
from potstill.engines.vllm import VllmEngine
from potstill.types import NonFiniteError

PROMPTS = [(1, 5, 6 + place % 4) for place in range(12)]
SEEDS = [(7, 0, place) for place in range(12)]
HOW = {"max_tokens": 9, "end_ids": (2,), "sampling": Sampling(batch_size=4), "vocab_size": 23}


@pytest.fixture
def program(tmp_path):
    return as_program(tmp_path)


@contextlib.contextmanager
def engine_of(model, folder, **spec):
    engine = VllmEngine(model, EngineSpec(**spec), folder, dtype="float32", max_tokens=64)
    try:
        yield engine
    finally:
        engine.close()


def test_what_is_drawn_is_drawn_from_the_model(student, tmp_path):
    """Log-probabilities are those of the model with the weights that were pushed last, and so are
    entropies, which the native engine tells itself."""
    served = make_model(seed=9).model
    with (
        serving(tmp_path / "fake", by_model(served)) as url,
        engine_of(student.model, tmp_path / "engine", url=url) as engine,
    ):
        for version in range(2):
            written = engine.write(PROMPTS, SEEDS, **HOW)
            for prompt, completion in zip(PROMPTS, written, strict=True):
                ids = torch.tensor([prompt + completion.token_ids])
                with torch.no_grad():
                    log_probs = student.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                drawn = log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0]
                assert completion.log_probs == pytest.approx(drawn.tolist(), abs=1e-4)
            with torch.no_grad():
                for weight in student.parameters():
                    weight.mul_(1.2)
            engine.update_weights(version + 1)
    assert calls(tmp_path / "fake").count("potstill_reload") == 2
    assert calls(tmp_path / "fake").count("reset") == 2


def test_without_the_reset_old_weights_would_write_the_first_token(student, tmp_path, monkeypatch):
    with serving(tmp_path / "fake") as url, engine_of(student.model, tmp_path, url=url) as engine:
        before = engine.write(PROMPTS, SEEDS, **HOW)
        with torch.no_grad():
            student.model.get_input_embeddings().weight.mul_(3.0)
        engine.update_weights(1)
        real = vllm.call_server

        def without_reset(url, path, *body, **options):
            return None if path == "/reset_prefix_cache" else real(url, path, *body, **options)

        monkeypatch.setattr(vllm, "call_server", without_reset)
        stale = engine.write(PROMPTS, SEEDS, **HOW)
        monkeypatch.setattr(vllm, "call_server", real)
        engine.update_weights(2)
        fresh = engine.write(PROMPTS, SEEDS, **HOW)
    firsts = [[each.log_probs[0] for each in written] for written in (before, stale, fresh)]
    assert firsts[0] == firsts[1] and firsts[1] != firsts[2]


def test_entropies_of_the_native_engine_are_found_again(student):
    for how in ({}, {"temperature": 0.7}, {"top_p": 0.8, "top_k": 5}, {"temperature": 0.0}):
        options = {"sampling": Sampling(**how), "vocab_size": 21}
        written = NativeEngine(student.model).write(
            PROMPTS, SEEDS, max_tokens=9, end_ids=(2,), **options
        )
        bare = [dataclasses.replace(each, entropies=()) for each in written]
        found = with_entropies(student, PROMPTS, bare, **options)
        for one, other in zip(written, found, strict=True):
            assert other.entropies == pytest.approx(one.entropies, abs=1e-5)


def test_an_engine_that_slept_takes_the_weights_anew(student, tmp_path, program, monkeypatch):
    """Also where they are the same, as they were given up; one that dies asleep is started."""
    folder = tmp_path / "engine"
    with engine_of(student.model, folder, python=program, sleep=True) as engine:
        engine.rest()
        wanted = engine.write(PROMPTS, SEEDS, **HOW)
        before = len(calls(folder))
        engine.rest()
        engine.rest()
        assert engine.write(PROMPTS, SEEDS, **HOW) == wanted
        done = [call for call in calls(folder)[before:] if call != "potstill_state"]
        woken = ["wake_up?tags=weights", "potstill_reload", "reset", "wake_up?tags=kv_cache"]
        assert done[:6] == ["sleep?level=2", *woken, "completion"]
        engine.rest()
        os.killpg(engine.server.process.pid, signal.SIGKILL)
        engine.server.process.wait()
        assert engine.write(PROMPTS, SEEDS, **HOW) == wanted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"engine\.sleep is true and there is no CUDA"):
        refuse_missing_program(EngineSpec(sleep=True, python=program))


def test_a_model_that_was_made_here_is_named_for_the_server(student, tmp_path, program):
    assert student.model.config.architectures is None
    with engine_of(student.model, tmp_path / "engine", python=program) as engine:
        engine.write(PROMPTS, SEEDS, **HOW)
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize("fault", ["slow", "500", "cut", "no json", "die", "bad push"])
def test_a_fault_changes_no_completion(student, tmp_path, program, fault):
    folder = tmp_path / "engine"
    with engine_of(student.model, folder, python=program, timeout=20) as engine:
        wanted = engine.write(PROMPTS, SEEDS, **HOW)
        if fault == "bad push":
            engine.update_weights(1)
        told(folder, **{fault: 1})
        started = time.monotonic()
        assert engine.write(PROMPTS, SEEDS, **HOW) == wanted
        assert time.monotonic() - started < 10
    pids = {json.loads(line)["pid"] for line in (folder / "calls.jsonl").read_text().splitlines()}
    assert len(pids) == (2 if fault in ("die", "bad push") else 1)


def test_a_hanging_engine_is_asked_again_and_given_up(student, tmp_path, program, monkeypatch):
    monkeypatch.setattr(vllm, "ATTEMPTS", 2)
    folder = tmp_path / "engine"
    with engine_of(student.model, folder, python=program, timeout=1) as engine:
        wanted = engine.write(PROMPTS, SEEDS, **HOW)
        told(folder, hang=1)
        assert engine.write(PROMPTS, SEEDS, **HOW) == wanted
        told(folder, hang=99)
        with pytest.raises(EngineError, match="failed 2 times") as error:
            engine.write(PROMPTS, SEEDS, **HOW)
    assert "no answer within 1 seconds" in str(error.value) and engine.url in str(error.value)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("400", EngineError, "told to say 400"),
        ("width", EngineError, "should have as many log-probabilities as tokens"),
        ("long", EngineError, "should have from 1 to 9 tokens"),
        ("row", EngineError, "should have ids below 23|no end token before|an end token"),
        ("nan", NonFiniteError, "not finite"),
        ("version", EngineError, "has weights 'of another' and the step's are"),
    ],
)
def test_a_wrong_answer_is_not_asked_for_again(student, tmp_path, fault, kind, message):
    with serving(tmp_path / "fake") as url, engine_of(student.model, tmp_path, url=url) as engine:
        told(tmp_path / "fake", **{fault: 1})
        with pytest.raises(kind, match=message):
            engine.write(PROMPTS, SEEDS, **HOW)
    assert calls(tmp_path / "fake").count("potstill_reload") == 1


def test_an_engine_that_dies_again_and_again_is_given_up(student, tmp_path, program):
    folder = tmp_path / "engine"
    with engine_of(student.model, folder, python=program, timeout=20) as engine:
        engine.write(PROMPTS, SEEDS, **HOW)
        told(folder, die=99)
        with pytest.raises(EngineError) as error:
            engine.write(PROMPTS, SEEDS, **HOW)
    line = str(error.value)
    assert "failed 3 times" in line and "the same command goes on" in line and "\n" not in line
    assert str(folder / "vllm.log") in line and "the fake engine was told to die" in line


def test_an_engine_that_cannot_start_shows_its_log(student, tmp_path):
    path = tmp_path / "python"
    said = ["W [a] OSError: x", "an ERROR [a] KeyError: no vllm", "bye"]
    path.write_text("".join(["#!/bin/sh\n", *(f"echo '{line}'\n" for line in said), "exit 1\n"]))
    path.chmod(0o755)
    wanted = r"before it served; .* says first: KeyError: no vllm; it ends: .*bye"
    with (
        engine_of(student.model, tmp_path / "engine", python=str(path)) as engine,
        pytest.raises(EngineError, match=wanted),
    ):
        engine.write(PROMPTS, SEEDS, **HOW)
    path.write_text("#!/bin/sh\nsleep 60\n")
    with (
        engine_of(student.model, tmp_path / "engine", python=str(path), timeout=0.5) as engine,
        pytest.raises(EngineError, match=r"did not serve within engine.timeout = 0\.5 seconds"),
    ):
        engine.write(PROMPTS, SEEDS, **HOW)


def test_a_server_at_a_url_may_come_back(student, tmp_path):
    """It is waited for, given the weights, and asked again."""
    spec = {"timeout": 20}
    folder = tmp_path / "fake"
    with serving(folder) as url, engine_of(student.model, tmp_path, url=url, **spec) as engine:
        wanted = engine.write(PROMPTS, SEEDS, **HOW)
    with (
        engine_of(student.model, tmp_path, url=url, timeout=0.2) as engine,
        pytest.raises(EngineError, match=f"the engine at {url} failed 3 times"),
    ):
        engine.write(PROMPTS, SEEDS, **HOW)
    with serving(folder) as url, engine_of(student.model, tmp_path, url=url, **spec) as engine:
        assert engine.write(PROMPTS, SEEDS, **HOW) == wanted


def test_what_is_drawn_ends_as_the_native_engine_ends_it(student, tmp_path):
    """Caps of their own, the end set alone, ids below the given number, greedy without numbers."""
    served, heard = make_model(seed=9).model, []
    caps = [1 + place % 5 for place in range(12)]
    with (
        serving(tmp_path / "fake", by_model(served)) as url,
        engine_of(student.model, tmp_path, url=url) as engine,
    ):
        how = HOW | {"vocab_size": 7, "max_tokens": caps}
        written = engine.write(PROMPTS, SEEDS, **how, on_token=lambda *one: heard.append(one))
        greedy = engine.write(PROMPTS, SEEDS, **(HOW | {"sampling": Sampling(temperature=0.0)}))
    assert max(max(each.token_ids) for each in written) < 7
    for each, cap in zip(written, caps, strict=True):
        assert each.stop == ("end" if each.token_ids[-1] == 2 else "length")
        assert each.stop == "end" or len(each.token_ids) == cap
    for place, each in enumerate(written):
        assert tuple(token_id for at, token_id in heard if at == place) == each.token_ids
    native = NativeEngine(student.model).write(
        PROMPTS, SEEDS, **(HOW | {"sampling": Sampling(temperature=0.0)})
    )
    assert [each.token_ids for each in greedy] == [each.token_ids for each in native]
    assert [each.log_probs for each in greedy] == [each.log_probs for each in native]


def test_draws_have_the_models_distribution(student, tmp_path):
    """First tokens of 1,000 seeds against the softmax: the seeds of requests are independent."""
    served = make_model(seed=9).model
    num = 1000
    how = HOW | {"max_tokens": 1, "sampling": Sampling(batch_size=8)}
    with (
        serving(tmp_path / "fake", by_model(served)) as url,
        engine_of(student.model, tmp_path, url=url) as engine,
    ):
        seeds = [(3, 1, place) for place in range(num)]
        written = engine.write([PROMPTS[0]] * num, seeds, **how)
    counts = np.bincount([each.token_ids[0] for each in written], minlength=23)
    with torch.no_grad():
        probs = student.model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1).numpy()
    assert np.abs(counts / num - probs).max() < 4 * np.sqrt(0.25 / num)


def test_a_killed_trainer_leaves_no_server(tmp_path, program):
    """SIGKILL: nothing of the trainer's own can end it."""
    code = f"""
import os, sys, time
sys.path[:0] = {sys.path!r}
from potstill.engines.server import Server
from pathlib import Path
folder = Path({str(tmp_path)!r}) / "engine"
folder.mkdir()
(folder / "config.json").write_text("{{}}")
server = Server([{program!r}, "--model", str(folder)], {{}}, folder / "log")
server.start(60)
print(server.process.pid, flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    os.kill(pid, 0)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    ends = time.monotonic() + 5
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_weights_are_shared_in_memory_or_beside_the_log(student, tmp_path, monkeypatch):
    left = tmp_path / "potstill-weights-left"
    left.mkdir()
    weights = shared.OwnWeights(student.model, tmp_path / "engine")
    with weights.files() as folder:
        assert (folder.parent == shared.SHARED_MEMORY) == shared.has_room(10**5)
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        num = len(student.backbone.layers)
        assert names == [
            *(f"{layer:05d}-model.safetensors" for layer in range(num)),
            f"{num:05d}-model.safetensors",
            f"{num:05d}-tied.safetensors",
        ]
        found = {}
        for name in names:
            found |= load_file(folder / name)
        own = student.model.state_dict()
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)
    assert not folder.exists() and left.exists()
    monkeypatch.setattr(shared, "SHARED_MEMORY", tmp_path / "nowhere")
    with shared.OwnWeights(student.model, tmp_path).files() as folder:
        assert folder.parent == tmp_path and not left.exists()
        # Another process leaves alone what is in use.
        shared._remove_left(tmp_path)
        assert folder.exists()


def test_a_proxy_is_not_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving(tmp_path) as url:
        assert server_calls.is_healthy(url) and not server_calls.is_gone(url)
    assert not server_calls.is_healthy(url) and server_calls.is_gone(url)
