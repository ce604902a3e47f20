"""A server that speaks as vLLM's does, with numbers of a small model, and fails as it is told.

As a program it takes the arguments of vLLM's server. Faults are in the file `faults.json` of the
model's folder: how often each is due, with a number that tells one such file from the next.
`calls.jsonl` there tells of every call.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HANG_SECONDS = 2.0
# Faults of one completion.
FAULTS = ("hang", "slow", "500", "400", "cut", "no json", "die", "width", "nan", "long", "row")
# From token ids to the logits of the next one.
Logits = Callable[[list[int]], np.ndarray]


def by_last_token(weights: dict[str, np.ndarray]) -> Logits:
    """Numbers that depend on the weights and on the last token, without a model's code."""
    table = weights["model.embed_tokens.weight"]
    return lambda ids: table[ids[-1]] @ table.T


class State:
    """The weights of a server, the cache of prompts, and the faults that are left."""

    def __init__(self, folder: Path, logits_of: Callable[[dict[str, np.ndarray]], Logits]):
        self.folder, self.logits_of, self.lock = folder, logits_of, threading.Lock()
        self.version, self.num_rows = "none", None
        self.logits: Logits | None = None
        # As vLLM's prefix cache, which knows nothing of new weights.
        self.cached: dict[tuple[int, ...], np.ndarray] = {}

    def fault(self, *names: str) -> str | None:
        """The first of these faults that is due; it is due once less from now on."""
        path, used_path = (self.folder / f"{name}.json" for name in ("faults", "used"))
        with self.lock:
            told = json.loads(path.read_text()) if path.exists() else {"number": 0, "faults": {}}
            used = json.loads(used_path.read_text()) if used_path.exists() else {}
            if used.get("number") != told["number"]:
                used = {"number": told["number"]}
            left = {name: num - used.get(name, 0) for name, num in told["faults"].items()}
            due = next((name for name in names if left.get(name, 0) > 0), None)
            if due is not None:
                used[due] = used.get(due, 0) + 1
                # Another thread may end this process in the middle of it.
                used_path.with_suffix(".new").write_text(json.dumps(used))
                used_path.with_suffix(".new").rename(used_path)
            return due

    def record(self, call: str) -> None:
        with self.lock, (self.folder / "calls.jsonl").open("a") as file:
            file.write(json.dumps({"pid": os.getpid(), "call": call}) + "\n")

    def call(self, method: str, arguments: list) -> str:
        if method == "potstill_state":
            self.num_rows = arguments[0] or None
            return self.version
        weights, version = arguments
        found = {}
        for file in sorted(Path(weights).glob("*.safetensors")):
            found |= load_file(file)
        self.logits = self.logits_of(found)
        self.version = "of another" if self.fault("version") else version
        return version

    def complete(self, body: dict) -> dict:
        assert self.logits is not None, "weights come first"
        random = np.random.default_rng(body["seed"])
        ids, log_probs = list(body["prompt"]), []
        while len(log_probs) < body["max_tokens"]:
            key = tuple(body["prompt"])
            if log_probs or key not in self.cached:
                logits = self.logits(ids)
                self.cached |= {} if log_probs else {key: logits}
            else:
                logits = self.cached[key]
            scaled = logits[: self.num_rows].astype(np.float64) / (body["temperature"] or 1.0)
            probs = np.exp(scaled - scaled.max())
            probs /= probs.sum()
            token_id = int(
                probs.argmax() if not body["temperature"] else random.choice(len(probs), p=probs)
            )
            ids.append(token_id)
            log_probs.append(float(np.log(probs[token_id])))
            if token_id in body["stop_token_ids"]:
                break
        written = ids[len(body["prompt"]) :]
        return {"token_ids": written, "logprobs": {"token_logprobs": log_probs}}


class Handler(BaseHTTPRequestHandler):
    state: State

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/collective_rpc":
            self.state.record(body["method"])
            if body["method"] == "potstill_reload" and self.state.fault("bad push"):
                return self.answer({"error": "told to refuse weights"}, 500)
            self.answer({"results": [self.state.call(body["method"], body["args"])]})
        elif self.path.startswith(("/sleep", "/wake_up")):
            self.state.record(self.path[1:])
            if self.path == "/sleep?level=2":
                # Weights and cache are gone.
                self.state.logits = None
            self.answer({"status": "as told"})
        elif self.path == "/reset_prefix_cache":
            self.state.record("reset")
            self.state.cached.clear()
            self.answer({"success": True})
        else:
            self.state.record("completion")
            self.complete(body)

    def complete(self, body: dict) -> None:
        fault = self.state.fault(*FAULTS)
        if fault == "die":
            print("the fake engine was told to die", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if fault in ("hang", "slow"):
            time.sleep(HANG_SECONDS if fault == "hang" else 0.2)
        if fault in ("500", "400"):
            return self.answer({"error": {"message": f"told to say {fault}"}}, int(fault))
        choice = self.state.complete(body)
        numbers = choice["logprobs"]["token_logprobs"]
        if fault == "width":
            numbers.append(-1.0)
        if fault == "nan":
            numbers[-1] = float("nan")
        if fault == "long":
            choice["token_ids"] += [5] * body["max_tokens"]
            numbers += [-1.0] * body["max_tokens"]
        if fault == "row":
            choice["token_ids"][-1] = 10**6
        self.answer({"choices": [choice]}, cut=fault == "cut", garbled=fault == "no json")

    def answer(self, found, status: int = 200, cut: bool = False, garbled: bool = False) -> None:
        data = b"<html>" if garbled else b"" if found is None else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)


class Server(ThreadingHTTPServer):
    # As many as are asked at once.
    request_queue_size = 256


def serve(state: State, port: int) -> ThreadingHTTPServer:
    """A server that is ready to serve."""
    server = Server(("127.0.0.1", port), type("Of", (Handler,), {"state": state}))
    server.daemon_threads = True
    return server


def main() -> None:
    arguments = dict(zip(sys.argv, sys.argv[1:], strict=False))
    folder = Path(arguments["--model"])
    assert (folder / "config.json").exists(), "the model's configuration is there"
    serve(State(folder, by_last_token), int(arguments["--port"])).serve_forever()


if __name__ == "__main__":
    main()
