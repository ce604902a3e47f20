"""A teacher behind a URL: the loss and its gradients are those of the model here, and a server that
is not what it should be is refused or asked again."""

import asyncio
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import served
import torch
from conftest import make_rollout, tiny_recipe
from small_runs import assert_same_run, rows_of
from waiting import wait_until

import potstill
from potstill.cli.app import main
from potstill.config import Objective, TeacherSpec
from potstill.models.language_model import fingerprint, load_model
from potstill.models.probe import ready
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.rollouts.batching import make_batches
from potstill.serving import limits
from potstill.serving.app import make_app
from potstill.teachers.remote import servers
from potstill.teachers.remote.reach import reach
from potstill.teachers.remote.states import StatesTeacher
from potstill.types import ModelError, NonFiniteError
from potstill.wire import request

TEACHER, STUDENT = "potstill:stops-teacher", "potstill:stops-student"
CPU = torch.device("cpu")
ROLLOUTS = [
    make_rollout([1, 5, 6], [9, 5, 2]),
    make_rollout([1, 7], [4, 4, 8, 9, 6, 2], trained=[True, False, *[True] * 4]),
    make_rollout([1], [3] * 11, stop="length"),
]


@pytest.fixture(scope="module")
def teacher():
    return ready(TEACHER).requires_grad_(False)


@pytest.fixture(scope="module")
def url(teacher):
    with served.in_a_thread(make_app(teacher, fingerprint(teacher))) as url:
        yield url


def spec(url, **more) -> TeacherSpec:
    return TeacherSpec(model=TEACHER, url=url, **more)


def loss_and_gradients(student, teacher, kl):
    objective = Objective(prefix="student", kl=kl, forward_weight=0.3)
    loss = Loss(objective=objective, normalize="token", vocab_size=student.vocab_size)
    student.zero_grad()
    values = []
    for batch in make_batches(ROLLOUTS, tokens_per_batch=24):
        signal = teacher_signal(teacher, batch, loss)
        loss_sum, _, stats = batch_loss(student, teacher, signal, batch, loss, 17)
        loss_sum.backward()
        values.append(stats.forward_kl_N if kl == "forward" else stats.reverse_kl_N)
    return torch.cat(values), [weight.grad.clone() for weight in student.parameters()]


@pytest.mark.parametrize("kl", ["forward", "reverse", "mixed", "jsd"])
def test_in_float32_it_equals_the_model_here(teacher, url, kl):
    student = load_model(STUDENT)
    here = loss_and_gradients(student, teacher, kl)
    there = loss_and_gradients(student, reach(spec(url), CPU), kl)
    torch.testing.assert_close(there[0], here[0], rtol=1e-6, atol=1e-7)
    for a, b in zip(there[1], here[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_in_bfloat16_the_mean_kl_is_near(teacher, url, kl):
    student = load_model(STUDENT)
    (here, _), (there, _) = (
        loss_and_gradients(student, each, kl)
        for each in (teacher, reach(spec(url, wire_dtype="bfloat16"), CPU))
    )
    assert 0 < abs(float(here.mean() - there.mean())) < 1e-3


def test_batches_of_chats_are_asked_for_ahead(teacher, url):
    """Their messages are dictionaries, which have no hash; nothing is asked for twice."""
    there, chat = reach(spec(url), CPU), ({"role": "user", "content": "hello"},)
    rollouts = []
    for rollout in ROLLOUTS:
        example = dataclasses.replace(rollout.prompt.example, prompt=chat)
        prompt = dataclasses.replace(rollout.prompt, example=example)
        rollouts.append(dataclasses.replace(rollout, prompt=prompt))
    batches = make_batches(rollouts, tokens_per_batch=24)
    there.expect(batches)
    there.begin = None
    for batch in batches:
        torch.testing.assert_close(there.signal_at(batch), teacher.signal_at(batch))


def test_it_is_the_model_in_all_else(teacher, url):
    there = reach(spec((url, url)), CPU)
    for name in ("name", "end_ids", "vocab_size", "context_length"):
        assert getattr(there, name) == getattr(teacher, name), name
    assert there.weights_digest() == fingerprint(teacher)
    assert torch.equal(there.head.weight_VD, teacher.head.weight_VD)
    assert there.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()


def test_a_run_is_the_same_to_the_bit(tmp_path, url):
    """With several batches a step, which are asked for before the first is needed."""
    pair = {"student": {"model": STUDENT}, "objective": {"prefix": "student", "kl": "mixed"}}
    pair["train"] = {"steps": 2, "tokens_per_batch": 64}
    for name, where in (("here", {}), ("there", {"url": url})):
        recipe = tiny_recipe(tmp_path / name, teacher={"model": TEACHER} | where, **pair)
        potstill.train(recipe, quiet=True)
    here, there = (
        [row | {"flops": 0, "total_flops": 0} for row in rows_of(tmp_path / name)]
        for name in ("here", "there")
    )
    assert here == there
    flops = [rows_of(tmp_path / name)[0]["flops"]["teacher"] for name in ("here", "there")]
    assert flops[0] > flops[1] == 0, "what is computed elsewhere is not ours"


def states_of(asked, width=48, **changed):
    """A right answer to a request, but for what is changed: each state depends on its id alone."""
    rows, parts, start = [], [], 0
    for index, ids in enumerate(asked["input"]):
        row = torch.stack([torch.sin(torch.arange(width) * (1.0 + i)) for i in ids])
        data = changed.get("states", lambda row: row)(row.float()).numpy().tobytes()
        place = {"index": index, "start": start, "end": start + len(data), "shape": [*row.shape]}
        rows.append(place)
        parts.append(data)
        start += len(data)
    headers = {"metadata": json.dumps({"data": rows[: changed.get("num_rows")]})}
    headers |= changed.get("headers", {})
    return changed.get("status", 200), headers, b"".join(parts)


WIDTH = load_model(TEACHER).head.weight_VD.shape[1]
FAULTS = {
    "another width": ({"width": 20}, ModelError, "name the model that the server has"),
    "not finite": ({"states": lambda row: row * math.nan}, NonFiniteError, "are not finite"),
    "of length one": (
        {"states": lambda row: row / row.norm(dim=-1, keepdim=True)},
        ModelError,
        "its activation is on",
    ),
    "rows are missing": ({"num_rows": -1}, ModelError, "rows for"),
    "metadata of another kind": (
        {"headers": {"metadata": '{"data": [{"index": 0}]}'}},
        ModelError,
        "without the header",
    ),
    "no metadata": ({"headers": {"metadata": "no"}}, ModelError, "without the header"),
    "refused": ({"status": 404}, ModelError, "status 404"),
    "broken": ({"status": 500}, ModelError, "has not answered for teacher.patience"),
    "cut": ({"headers": {"cut": "10"}}, ModelError, "has not answered for teacher.patience"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_is_not_what_it_should_be(fault, monkeypatch):
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.05)
    changed, error, says = FAULTS[fault]
    options = {"width": WIDTH} | changed
    with (
        served.that_answers(lambda asked: states_of(asked, **options)) as url,
        pytest.raises(error, match=says) as raised,
    ):
        reach(spec(url, patience=0.3), CPU)
    assert url in str(raised.value) and "\n" not in str(raised.value)


def test_a_server_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(servers, "REQUEST_SECONDS", 0.2)
    hangs = threading.Event()

    def hang(asked):
        hangs.wait(5)
        return states_of(asked, WIDTH)

    with (
        served.that_answers(hang) as url,
        pytest.raises(ModelError, match="has not answered for teacher"),
    ):
        reach(spec(url, patience=0.5), CPU)
    hangs.set()


def test_a_server_that_disagrees_with_itself_is_refused():
    """Numbers depend on what else is asked for, as of a server with a fault in its batching."""

    def confused(asked):
        return states_of(asked, WIDTH, states=lambda row: row + 0.1 * (len(asked["input"]) - 1))

    with (
        served.that_answers(confused) as url,
        pytest.raises(ModelError, match="disagrees with itself"),
    ):
        reach(spec(url), CPU)


def test_faults_on_the_way_are_asked_again_and_change_nothing(monkeypatch, teacher, url):
    """Of two servers one is broken half of the time, and answers with half of a body at others."""
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)
    numbers = iter(range(10**6))

    def sometimes(asked):
        number = next(numbers)
        body = json.dumps(asked).encode()
        if number % 3 == 1:
            return 503, {}, b"busy"
        answer = request(url, "/pooling", json.loads(body), seconds=30)
        headers = {"metadata": answer.headers["metadata"]}
        return 200, headers | ({"cut": "100"} if number % 3 == 2 else {}), answer.body

    student = load_model(STUDENT)
    with served.that_answers(sometimes) as broken:
        there = StatesTeacher(spec((broken, url)), CPU)
        found = [loss_and_gradients(student, there, "reverse") for _ in range(3)]
    here = loss_and_gradients(student, teacher, "reverse")
    for values, _ in found:
        torch.testing.assert_close(values, here[0], rtol=1e-6, atol=1e-7)


def test_a_token_is_wanted(monkeypatch, teacher):
    monkeypatch.setenv("THE_TOKEN", "secret")
    monkeypatch.setenv("ANOTHER", "wrong")
    with served.in_a_thread(make_app(teacher, "print", token="secret")) as url:
        assert reach(spec(url, token_variable="THE_TOKEN"), CPU).weights_digest() == "print"
        for given in ({}, {"token_variable": "ANOTHER"}):
            with pytest.raises(ModelError, match="wants a token"):
                reach(spec(url, **given), CPU)
        with pytest.raises(ModelError, match=r"NOT_THERE.*is not set; export it first"):
            reach(spec(url, token_variable="NOT_THERE"), CPU)
        assert served.answers(url)


def test_a_host_that_others_reach_wants_a_token(capsys):
    with pytest.raises(SystemExit):
        main(["serve", TEACHER, "--host", "0.0.0.0"])
    assert "anyone could use the model" in capsys.readouterr().err


BAD = [
    {"input": [[1, 2, 10**6]]},
    {"input": [[-1]]},
    {"input": [[]]},
    {"input": []},
    {"input": [[1]] * 65},
    {"input": [[1] * 5000]},
    {"input": "text"},
    {"input": [[1]], "task": "embed"},
    {"input": [[1]], "use_activation": True},
    {"input": [[1]], "unheard": "of"},
    {"input": [[1]], "embed_dtype": "int4"},
    [],
]


def post(url: str, data: bytes) -> int:
    """The status of the answer to raw bytes as JSON."""
    place = url.removeprefix("http://").split(":")
    with socket.create_connection((place[0], int(place[1])), timeout=30) as connection:
        head = "POST /pooling HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return int(connection.makefile("rb").readline().split()[1])


def test_bad_requests_are_answered_and_the_server_stays(url):
    for body in BAD:
        assert 400 <= post(url, json.dumps(body).encode()) < 500, body
    for data in (b"", b"{", b"\xff\xfe", b"[" * 10_000):
        assert 400 <= post(url, data) < 500
    assert served.answers(url)


def test_long_and_slow_requests_are_refused(teacher, monkeypatch):
    monkeypatch.setattr("potstill.serving.app.SECONDS", 0.3)
    monkeypatch.setattr("potstill.serving.app.MAX_BYTES", 1000)
    with served.in_a_thread(make_app(teacher, "print")) as url:
        assert post(url, b" " * 2000) == 413
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(b"POST /pooling HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            assert b"408" in slow.makefile("rb").readline()
        assert served.answers(url)


def test_a_client_that_stops_reading_is_let_go():
    """The application waits for it no longer than it must."""

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"much"})

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def never(message):
        await asyncio.sleep(60)

    scope = {"type": "http", "path": "/", "headers": []}
    app = limits.Limits(endless, token=None, max_bytes=10, seconds=0.1)
    with pytest.raises(TimeoutError):
        asyncio.run(app(scope, receive, never))


def test_completions_are_exact_and_pure(teacher, url):
    """The same seed draws the same tokens, whose log-probabilities are the model's."""
    body = {"prompt": [1, 5, 6], "seed": 7, "max_tokens": 12, "stop_token_ids": [2]}
    first, second = (request(url, "/v1/completions", body, seconds=30).json() for _ in range(2))
    assert first == second
    refused = request(url, "/v1/completions", body | {"max_tokens": 5000}, seconds=30)
    assert refused.status == 400 and "3 ids and max_tokens is 5000" in refused.text
    (choice,) = first["choices"]
    ids = choice["token_ids"]
    hidden = teacher(torch.tensor([[1, 5, 6, *ids[:-1]]]))[0, 2:]
    log_probs = teacher.head(hidden).log_softmax(-1)[range(len(ids)), ids]
    found = torch.tensor(choice["logprobs"]["token_logprobs"])
    torch.testing.assert_close(found, log_probs, rtol=1e-4, atol=1e-5)


def resident_bytes(process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.slow
def test_two_hundred_bad_requests_leave_the_memory_flat():
    port = served.free_port()
    process, url = served.as_a_process(TEACHER, port), f"http://127.0.0.1:{port}"
    try:
        bodies = [json.dumps(body).encode() for body in BAD] + [b"{"]
        sizes = []
        for number in range(100):
            for body in (bodies[number % len(bodies)], b" " * 2**22):
                assert 400 <= post(url, body) < 500
            sizes.append(resident_bytes(process))
        assert served.answers(url) and process.poll() is None
        # 400 MiB were sent. The allocator keeps some of what it had.
        assert sizes[-1] - sizes[10] < 100 * 2**20, (sizes[10], sizes[-1])
    finally:
        process.kill()
        process.wait()


RUN = """
[student]
model = "potstill:stops-student"
[teacher]
model = "potstill:stops-teacher"
url = "http://127.0.0.1:{port}"
patience = {patience}
[objective]
prefix = "student"
kl = "reverse"
[data]
num_prompts = 64
[window]
tokens = 24
[train]
steps = 60
prompts_per_step = 8
lr = 1e-4
checkpoint_every = 5
[validation]
num_prompts = 0
"""


def recipe_at(folder: Path, port: int, patience: float = 120) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RUN.format(port=port, patience=patience))
    return path


def num_rows(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.slow
def test_a_server_that_is_killed_five_times_changes_no_bit(tmp_path):
    """Whatever was under way is asked again of the next one."""
    port = served.free_port()
    recipe = str(recipe_at(tmp_path, port))
    server = served.as_a_process(TEACHER, port)
    command = [sys.executable, "-m", "potstill", "train", recipe, "--out"]
    subprocess.run([*command, str(tmp_path / "quiet")], check=True, capture_output=True)
    run = subprocess.Popen([*command, str(tmp_path / "troubled")], stderr=subprocess.DEVNULL)
    for kill in range(5):
        wait_until(lambda kill=kill: num_rows(tmp_path / "troubled") > 10 * kill, run)
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        server = served.as_a_process(TEACHER, port)
    assert run.wait(timeout=300) == 0
    server.kill()
    server.wait()
    assert_same_run(tmp_path / "quiet", tmp_path / "troubled")


@pytest.mark.slow
def test_a_server_that_is_gone_for_good_ends_the_run_which_can_go_on(tmp_path):
    port = served.free_port()
    recipe = str(recipe_at(tmp_path, port, patience=5))
    command = [sys.executable, "-m", "potstill", "train", recipe, "--out", str(tmp_path / "run")]
    server = served.as_a_process(TEACHER, port)
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: num_rows(tmp_path / "run") > 6, run)
    server.kill()
    server.wait()
    _, said = run.communicate(timeout=120)
    assert run.returncode == 2
    assert f"http://127.0.0.1:{port} has not answered for teacher.patience = 5" in said
    assert num_rows(tmp_path / "run") < 60
    server = served.as_a_process(TEACHER, port)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    server.kill()
    server.wait()
    assert ended.returncode == 0 and num_rows(tmp_path / "run") == 60, ended.stderr
