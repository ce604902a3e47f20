"""Servers of vLLM's CPU build as teachers: one of hidden states, and one of log-probabilities.
`make test-vllm` installs it and runs these."""

import os
from pathlib import Path

import pytest
import torch
from conftest import make_rollout
from padded_heads import with_wide_heads
from small_runs import rows_of

from potstill import load_model, train, wire
from potstill.config import Objective, TeacherSpec, make_recipe
from potstill.engines.server import Server
from potstill.engines.vllm import environment_of
from potstill.models.probe import ready
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.rollouts.batching import make_batches
from potstill.teachers.remote.logprobs import log_probs_request
from potstill.teachers.remote.reach import fit_to_loss, reach
from potstill.types import ModelError

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("POTSTILL_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
STUDENT = "potstill:stops-student"
CPU = torch.device("cpu")
ENDS = (2, 23)
# Longer than a block of the prefix cache, and with one beginning.
SHARED = [1, *(3 + (7 * place) % 17 for place in range(150))]
ROLLOUTS = [
    make_rollout([*SHARED, 5 + row % 9], [3 + (row * i) % 19 for i in range(row % 7)] + [end])
    for row in range(20)
    for end in ENDS
]
POOLING = ("--runner", "pooling", "--convert", "embed", "--pooler-config")
POOLING += ('{"task": "token_embed", "use_activation": false}',)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The teacher in a shape that vLLM's CPU build has."""
    model, folder = load_model("potstill:stops-teacher"), tmp_path_factory.mktemp("wide")
    with_wide_heads(model.model).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(request, folder, tmp_path_factory):
    """The URL of a server that is started as docs/teachers.md does; one at a time."""
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    server = Server([*command, *request.param], environment_of(CPU, log.parent), log)
    server.start(600)
    yield server.url
    server.stop()


of_states = pytest.mark.parametrize("url", [POOLING], indirect=True, ids=["states"])
of_log_probs = pytest.mark.parametrize(
    "url", [("--max-logprobs", "24")], indirect=True, ids=["logprobs"]
)


def found_by(teacher, objective, end_class=()):
    """The loss of each token and the gradient."""
    student = load_model(STUDENT)
    loss = Loss(objective=objective, normalize="token", vocab_size=24, end_class=end_class)
    losses = []
    for batch in make_batches(ROLLOUTS, tokens_per_batch=2048):
        signal = teacher_signal(teacher, batch, loss)
        loss_sum, loss_N, _ = batch_loss(student, teacher, signal, batch, loss, 100)
        loss_sum.backward()
        losses.append(loss_N)
    gradient = torch.cat([weight.grad.flatten() for weight in student.parameters()])
    return torch.cat(losses), gradient


def gaps(there, here, objective, end_class=()):
    """The largest difference of a token's loss (nats), and that of gradients, relative to their
    norm."""
    (a, a_gradient), (b, b_gradient) = (
        found_by(teacher, objective, end_class) for teacher in (there, here)
    )
    size = (a_gradient - b_gradient).norm() / b_gradient.norm()
    print(f"{objective.name}: loss {(a - b).abs().max():.2g}, gradient {size:.2g}")
    return float(((a - b).abs() / b.abs().clamp(min=1)).max()), float(size)


def runs(tmp_path, folder, **teacher):
    """A few steps of training."""
    recipe = {
        "out": str(tmp_path / "run"),
        "student": {"model": STUDENT},
        "teacher": {"model": str(folder), **teacher},
        "objective": {"prefix": "student", "kl": "reverse"},
        "window": {"tokens": 24},
        "data": {"num_prompts": 64},
        "train": {"steps": 3, "prompts_per_step": 8, "lr": 1e-4},
        "validation": {"num_prompts": 0},
    }
    if teacher.get("protocol") == "logprobs":
        recipe["objective"] |= {"signal": "sampled"}
    train(make_recipe(recipe), quiet=True)
    return [row["loss"] for row in rows_of(tmp_path / "run")]


@of_states
def test_hidden_states_give_the_divergences_of_the_model_here(folder, url):
    here = ready(str(folder)).requires_grad_(False)
    for dtype, most in (("float32", 1e-4), ("bfloat16", 0.3)):
        there = reach(TeacherSpec(model=str(folder), url=url, wire_dtype=dtype), CPU)
        assert there.context_length == 256 and there.decoder is None
        for kl in ("forward", "reverse"):
            of_loss, of_gradient = gaps(there, here, Objective(prefix="student", kl=kl), ENDS)
            assert of_loss < most and of_gradient < most


@of_states
def test_a_run_with_hidden_states(tmp_path, folder, url):
    there = runs(tmp_path / "there", folder, url=url)
    assert there == pytest.approx(runs(tmp_path / "here", folder), abs=1e-4)


@of_log_probs
def test_log_probs_give_the_estimates_of_the_model_here(folder, url):
    here = ready(str(folder)).requires_grad_(False)
    there = reach(TeacherSpec(model=str(folder), url=url, protocol="logprobs"), CPU)
    assert there.context_length == 255
    fit_to_loss(there, 24, ENDS)
    for estimator, kl in (("k1", "reverse"), ("k2", "reverse"), ("k3", "forward")):
        objective = Objective(prefix="student", kl=kl, signal="sampled", estimator=estimator)
        assert max(gaps(there, here, objective, ENDS)) < 1e-4


@of_log_probs
def test_log_probs_give_the_top_k_losses_of_the_model_here(folder, url):
    here, spec = ready(str(folder)).requires_grad_(False), {"protocol": "logprobs"}
    for top_k in (1, 5, 24):
        there = reach(TeacherSpec(model=str(folder), url=url, **spec), CPU, top_k=top_k)
        fit_to_loss(there, 24, ())
        for kl in ("forward", "reverse", "jsd"):
            objective = Objective(prefix="dataset", kl=kl, signal="topk", top_k=top_k)
            assert max(gaps(there, here, objective)) < 1e-4


@of_log_probs
def test_log_probs_are_printed_in_full(folder, url):
    """Each number of the answer is a float32, to the last bit."""
    body = log_probs_request([SHARED], 5) | {"model": str(folder)}
    found = wire.request(url, "/v1/completions", body, seconds=60).json()
    rows = found["choices"][0]["prompt_logprobs"][1:]
    values = torch.tensor([e["logprob"] for row in rows for e in row.values()], dtype=torch.float64)
    assert len(values) >= 5 * 150 and torch.equal(values.float().double(), values)


@of_log_probs
def test_more_than_the_server_keeps_is_refused(folder, url):
    body = log_probs_request([[1, 2]], 25) | {"model": str(folder)}
    answer = wire.request(url, "/v1/completions", body, seconds=60)
    assert answer.status == 400 and "greater than max allowed: 24" in answer.text


@of_log_probs
def test_a_run_with_log_probs(tmp_path, folder, url):
    there = runs(tmp_path / "there", folder, url=url, protocol="logprobs")
    assert all(map(float, there))
    with pytest.raises(ModelError, match="refuses /pooling"):
        reach(TeacherSpec(model=str(folder), url=url), CPU)
