"""Servers of a teacher: ours in a thread or a process, and one that answers as it is told."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from waiting import wait_until

from potstill.wire import Unavailable, request


@contextmanager
def in_a_thread(app, port: int = 0):
    """The URL of an application while it is served."""
    import uvicorn

    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


def as_a_process(model: str, port: int, *more: str) -> subprocess.Popen:
    """`potstill serve`, once it answers."""
    command = [sys.executable, "-m", "potstill", "serve", model, "--port", str(port), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: answers(f"http://127.0.0.1:{port}"), process)
    return process


def answers(url: str) -> bool:
    try:
        return request(url, "/health", seconds=2).status == 200
    except Unavailable:
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def that_answers(
    states: Callable[[dict[str, Any]], tuple[int, dict[str, str], bytes]], **told: Any
):
    """The URL of a server that answers what is POSTed with a status, headers and a body, of which a
    header `cut` has only so many bytes sent; `told` is what it tells of its model."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *given):
            pass

        def do_GET(self):
            self._send(200, {}, json.dumps({"data": [{"id": "fake"} | told]}).encode())

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*states(asked))

        def _send(self, status, headers, body):
            headers = dict(headers)
            num_sent = int(headers.pop("cut", len(body)))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:num_sent])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def log_probs_of(model, most: int = 20):
    """Answers with the log-probabilities of prompts, as vLLM's server words them, for
    `that_answers`; of at most so many tokens a position."""

    def answer(asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        k = asked["prompt_logprobs"]
        if k > most:
            says = f"Requested prompt logprobs of {k}, which is greater than max allowed: {most}"
            return 400, {}, json.dumps({"error": {"message": says}}).encode()
        choices = []
        for index, ids in enumerate(asked["prompt"]):
            with torch.no_grad():
                log_probs_TV = model.head(model(torch.tensor([ids]))[0]).float().log_softmax(-1)
            told = [None] + [
                _told(row_V, i, k) for row_V, i in zip(log_probs_TV, ids[1:], strict=False)
            ]
            choices.append({"index": index, "text": "", "prompt_logprobs": told})
        return 200, {}, json.dumps({"choices": choices}).encode()

    return answer


def _told(log_probs_V: torch.Tensor, token_id: int, k: int) -> dict[str, dict[str, Any]]:
    """The token itself comes first, and is one more where it is not among the likeliest."""
    order = log_probs_V.argsort(descending=True).tolist()
    chosen = dict.fromkeys([token_id, *order[:k]])
    ranks = {i: rank for rank, i in enumerate(order, 1)}
    return {
        str(i): {"logprob": float(log_probs_V[i]), "rank": ranks[i], "decoded_token": "?"}
        for i in chosen
    }
