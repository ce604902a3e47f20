"""vLLM's CPU build as an engine. `make test-vllm` installs it and runs these.

Prompts have 256 ids and more, so that a block of the prefix cache (128 ids on a CPU) is whole.
"""

import copy
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from padded_heads import with_wide_heads

from potstill import load_model, train
from potstill.config import EngineSpec, Lora, Sampling, make_recipe, to_toml
from potstill.engines.entropies import with_entropies
from potstill.engines.shared import OwnWeights
from potstill.engines.vllm import VllmEngine
from potstill.models.adapters import attach
from potstill.runs import run_folder

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("POTSTILL_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
BLOCKS = 256
SHARED = tuple(3 + (7 * place) % 17 for place in range(BLOCKS))
PROMPTS = [(*SHARED, *(3 + (place + i) % 17 for i in range(place % 9))) for place in range(48)]
SEEDS = [(7, 0, place) for place in range(48)]
HOW = {"max_tokens": 24, "end_ids": (2,), "sampling": Sampling(), "vocab_size": 23}


@pytest.fixture(scope="module")
def student():
    model = load_model("potstill:base")
    return model.around(with_wide_heads(model.model), "wide")


@pytest.fixture(scope="module")
def engine(student, tmp_path_factory):
    folder, spec = tmp_path_factory.mktemp("engine"), EngineSpec(python=PYTHON)
    engine = VllmEngine(student.model, spec, folder, dtype="float32", max_tokens=512)
    yield engine
    engine.close()


def gap(student, written):
    """The largest difference to the log-probabilities of the student as it is now."""
    gaps = []
    for prompt, completion in zip(PROMPTS, written, strict=True):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            log_probs = student.model(ids).logits[0, len(prompt) - 1 : -1, :23].log_softmax(-1)
        drawn_N = log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        gaps.append((drawn_N - torch.tensor(completion.log_probs)).abs().max().item())
    return max(gaps)


def change(student, factor=1.15):
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(factor)


def core_of(engine) -> int:
    """The process that computes: not the one that serves HTTP."""
    (core,) = pids("-g", str(engine.server.process.pid), "-f", "EngineCore")
    return core


def pids(*options: str) -> list[int]:
    listed = subprocess.run(["pgrep", *options], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def test_wide_heads_change_no_number(student):
    narrow, ids = load_model("potstill:base").model, torch.tensor([SHARED])
    with torch.no_grad():
        torch.testing.assert_close(
            student.model(ids).logits, narrow(ids).logits, rtol=1e-3, atol=1e-3
        )


def test_new_weights_write_and_seeds_repeat(student, engine, monkeypatch):
    first = engine.write(PROMPTS, SEEDS, **HOW)
    assert gap(student, first) < 1e-4
    assert engine.write(PROMPTS, SEEDS, **HOW) == first
    assert engine.write(PROMPTS[::2], SEEDS[::2], **HOW) == first[::2]
    change(student)
    # The negative control: without the reset the old cache is read.
    answer = VllmEngine._answer
    with monkeypatch.context() as patch:
        patch.setattr(
            VllmEngine,
            "_answer",
            lambda self, path, body: None if "cache" in path else answer(self, path, body),
        )
        engine.update_weights(1)
        stale = engine.write(PROMPTS, SEEDS, **HOW)
    engine.update_weights(2)
    fresh = engine.write(PROMPTS, SEEDS, **HOW)
    print(f"largest gap: {gap(student, fresh):.2g} fresh, {gap(student, stale):.2g} without reset")
    assert gap(student, fresh) < 1e-4 and gap(student, stale) > 1e-2


def test_draws_are_exact(student, engine):
    """log p of what was drawn plus the entropy there has the mean 0, whatever was drawn before."""
    engine.update_weights(3)
    prompts, seeds = PROMPTS * 20, [(8, 1, place) for place in range(48 * 20)]
    written = engine.write(prompts, seeds, **HOW)
    told = with_entropies(student, prompts, written, sampling=Sampling(), vocab_size=23)
    sums = [sum(each.log_probs) + sum(each.entropies) for each in told]
    error = statistics.stdev(sums) / len(sums) ** 0.5
    assert abs(statistics.fmean(sums)) < 4 * error
    few = engine.write(PROMPTS, SEEDS, **(HOW | {"vocab_size": 9}))
    assert max(max(each.token_ids) for each in few) < 9


def test_an_adapter_writes(student, engine, tmp_path, monkeypatch):
    """The weights that go over are merged."""
    adapted = student.around(copy.deepcopy(student.model), "adapted")
    attach(adapted.model, Lora(rank=4), seed=0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "weights", OwnWeights(adapted.model, tmp_path))
        engine.update_weights(4)
        written = engine.write(PROMPTS, SEEDS, **HOW)
    engine.update_weights(5)
    print(f"largest gap: {gap(adapted, written):.2g} adapted, {gap(student, written):.2g} base")
    assert gap(adapted, written) < 1e-4 and gap(student, written) > 1e-2


@pytest.mark.parametrize("when", ["idle", "writing"])
def test_a_killed_core_changes_no_completion(engine, when):
    prompts, seeds = PROMPTS * 8, [(9, 1, place) for place in range(48 * 8)]
    wanted = engine.write(prompts, seeds, **HOW)
    core, noticed = core_of(engine), []

    def kill():
        os.kill(core, signal.SIGKILL)
        noticed.append(time.monotonic())

    def on_token(place, token_id):
        if when == "writing" and not noticed:
            kill()

    recover = engine._recover
    engine._recover = lambda *given: (noticed.append(time.monotonic()), recover(*given))
    if when == "idle":
        kill()
    assert engine.write(prompts, seeds, **HOW, on_token=on_token) == wanted
    del engine._recover
    print(f"noticed after {noticed[1] - noticed[0]:.1f} s")
    assert noticed[1] - noticed[0] < 5


def test_a_killed_trainer_leaves_no_process(tmp_path):
    code = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from test_real_vllm import *
model = load_model("potstill:base")
engine = VllmEngine(
    with_wide_heads(model.model), EngineSpec(python=PYTHON), Path({str(tmp_path)!r}),
    dtype="float32", max_tokens=512,
)
engine.write(PROMPTS, SEEDS, **HOW)
print(engine.server.process.pid, flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    group = trainer.stdout.readline().strip()
    assert len(pids("-g", group)) > 3
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    ends = time.monotonic() + 15
    while pids("-g", group):
        assert time.monotonic() < ends
        time.sleep(0.1)


@pytest.mark.parametrize("where", ["url", "started"])
def test_two_ranks_write_what_one_does(engine, tmp_path, forks, where):
    """With one server for both, and with one each; that of one rank has other weights before."""
    base = load_model("potstill:base")
    wide = base.around(with_wide_heads(base.model), "wide")
    wide.model.save_pretrained(tmp_path / "wide")
    wide.tokenizer.save_pretrained(tmp_path / "wide")
    engine.write(PROMPTS[:1], SEEDS[:1], **HOW)
    found = {}
    # One rank with a server of its own is what other tests have.
    for num_ranks in (1, 2):
        there = {"python": PYTHON} if (where, num_ranks) == ("started", 2) else {"url": engine.url}
        recipe = {
            "out": str(tmp_path / f"on-{num_ranks}"),
            "student": {"model": str(tmp_path / "wide")},
            "objective": {"prefix": "student", "kl": "reverse"},
            "data": {"num_prompts": 64},
            "window": {"tokens": 48},
            # So small that later rollouts are the same to the last token, and mean another version.
            "train": {"steps": 3, "prompts_per_step": 16, "lr": 1e-6},
            "validation": {"num_prompts": 3, "every": 3},
            "rollouts": {"engine": "vllm"},
            "engine": there,
        }
        (tmp_path / "recipe.toml").write_text(to_toml(make_recipe(recipe).resolved()))
        began = time.monotonic()
        argv = ["train", "recipe.toml", "--out", f"on-{num_ranks}"]
        ended = forks.run_ranks(tmp_path, argv, num_ranks)
        assert ended.code == 0, ended.err
        found[num_ranks] = run_folder.read_metrics(tmp_path / f"on-{num_ranks}")
        print(f"{where}, {num_ranks} ranks: {time.monotonic() - began:.0f} s")
    for one, other in zip(found[1], found[2], strict=True):
        for name in ("loss", "reverse_kl", "student_entropy", "grad_norm", "length"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
        assert other["engine_mismatch_max"] < 1e-3
    one, other = (
        run_folder.read_rows(tmp_path / f"on-{num}" / "validation.jsonl") for num in (1, 2)
    )
    assert len(one) == len(other) == 2
    for name in ("teacher_prefix_forward_kl", "student_prefix_reverse_kl"):
        assert [row[name] for row in other] == [pytest.approx(row[name], rel=1e-4) for row in one]
    assert len({row["engine_mismatch_max"] for row in found[2]}) == 3


def test_a_run_is_as_one_of_the_native_engine(student, tmp_path, capsys):
    """20 steps on policy: means of the last 10 against those of other seeds of the native engine,
    with the engine killed half-way."""
    base = load_model("potstill:base")
    wide = base.around(with_wide_heads(base.model), "wide")
    wide.model.save_pretrained(tmp_path / "wide")
    wide.tokenizer.save_pretrained(tmp_path / "wide")
    names = ("reverse_kl", "forward_kl", "student_entropy", "length", "truncation")

    def means_of(out, seed, engine, on_step=None):
        recipe = {
            "out": str(tmp_path / out),
            "student": {"model": str(tmp_path / "wide")},
            "objective": {"prefix": "student", "kl": "reverse"},
            "data": {"num_prompts": 512},
            "window": {"tokens": 64},
            "train": {"steps": 20, "prompts_per_step": 32, "lr": 1e-3, "seed": seed},
            "validation": {"num_prompts": 0},
            "rollouts": {"engine": engine},
        }
        recipe |= {"engine": {"python": PYTHON}} if engine == "vllm" else {}
        train(make_recipe(recipe), on_step=on_step, quiet=True)
        rows = run_folder.read_metrics(tmp_path / out)
        return {name: statistics.fmean(row[name] for row in rows[10:]) for name in names}, rows

    native = [means_of(f"native-{seed}", seed, "native")[0] for seed in range(1, 7)]

    def kill_half_way(row):
        if row["step"] == 10:
            (guard,) = pids("-P", str(os.getpid()), "-f", f"{tmp_path / 'vllm'}")
            (core,) = pids("-g", str(guard), "-f", "EngineCore")
            os.kill(core, signal.SIGKILL)

    found, rows = means_of("vllm", 0, "vllm", kill_half_way)
    assert "the engine has died" in capsys.readouterr().err
    assert max(row["engine_mismatch_max"] for row in rows) < 1e-3
    for name in names:
        others = [each[name] for each in native]
        mean, spread = statistics.fmean(others), statistics.stdev(others)
        print(f"{name}: vllm {found[name]:.4f}, native {mean:.4f} ± {spread:.4f}")
        # A new draw of a normal distribution whose spread is known from six.
        assert abs(found[name] - mean) < 5 * spread * (1 + 1 / len(others)) ** 0.5
