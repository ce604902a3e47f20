"""Servers that speak as vLLM does, in this process or as a program, and what they were asked."""

import contextlib
import json
import sys
import threading
import time
from pathlib import Path

import fake_vllm
import torch


def by_model(model):
    """The logits of a model of ours with the weights that a server was given."""

    def logits_of(weights):
        model.load_state_dict({name: torch.from_numpy(each) for name, each in weights.items()})

        def logits(ids):
            with torch.no_grad():
                return model(torch.tensor([ids])).logits[0, -1].numpy()

        return logits

    return logits_of


def as_program(folder: Path) -> str:
    """A program that stands for the interpreter of vLLM's environment."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_vllm.__file__} "$@"\n')
    path.chmod(0o755)
    return str(path)


@contextlib.contextmanager
def serving(folder: Path, logits_of=fake_vllm.by_last_token):
    """A server in this process, by its URL."""
    folder.mkdir(exist_ok=True)
    server = fake_vllm.serve(fake_vllm.State(folder, logits_of), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def told(folder: Path, **faults: int) -> None:
    """Have a server fail so often from now on, whatever is still under way there."""
    data = json.dumps({"number": time.monotonic_ns(), "faults": faults})
    (folder / "faults.new").write_text(data)
    (folder / "faults.new").rename(folder / "faults.json")


def calls(folder: Path) -> list[str]:
    return [json.loads(line)["call"] for line in (folder / "calls.jsonl").read_text().splitlines()]
