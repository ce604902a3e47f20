"""Tokens a second of potstill's own sampler, of transformers' generate, and of vLLM as an engine.

A random model writes to prompts of one length, in turns, and no row ends before the cap: that is
kind to a batch that is decoded as one. What counts is wall time, as vLLM computes in processes of
its own. Its server is started and has the weights before anything is timed. `--vllm ""` leaves it
out.
"""

import contextlib
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import tyro

from potstill.config import EngineSpec, Sampling
from potstill.engines.make import engine_for
from potstill.engines.protocol import Engine

HERE = ".venv-vllm/bin/python"
# A model of 40 million weights, whose heads vLLM's CPU build computes.
SMALL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


class Load(NamedTuple):
    prompts: int
    prompt_tokens: int
    tokens: int


def measure(
    model: Any, load: Load, python: str, rounds: int, args: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """A row for each way to write, with the medians of the rounds, in which each takes its turn."""
    prompts = [tuple(range(1, 1 + load.prompt_tokens))] * load.prompts
    spec = EngineSpec(python=python, args=args) if python else None
    with contextlib.ExitStack() as stack:
        place: dict[str, Any] = {"folder": None, "max_tokens": load.prompt_tokens + load.tokens}
        engines = {"potstill": stack.enter_context(engine_for(None, model, **place))}
        if spec is not None:
            engines["vLLM"] = stack.enter_context(engine_for(spec, model, **place))
        ways = {name: _writing(engine, prompts, load) for name, engine in engines.items()}
        ways["generate"] = _generating(model, prompts, load)
        for way in ways.values():
            way()
        seconds = [{name: _seconds(way) for name, way in ways.items()} for _ in range(rounds)]
    rates = {
        name: load.prompts * load.tokens / statistics.median(each[name] for each in seconds)
        for name in ways
    }
    return [
        {"method": name, "tokens/s": rate, "beside potstill": rate / rates["potstill"]}
        for name, rate in rates.items()
    ]


def _writing(engine: Engine, prompts: list[tuple[int, ...]], load: Load) -> Callable[[], None]:
    def write() -> None:
        engine.write(
            prompts,
            [(0, 0, place) for place in range(len(prompts))],
            max_tokens=load.tokens,
            end_ids=(),
            sampling=Sampling(batch_size=len(prompts)),
        )

    return write


def _generating(model: Any, prompts: list[tuple[int, ...]], load: Load) -> Callable[[], None]:
    ids = torch.tensor(prompts, device=model.device)
    told = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "attention_mask": ids != 0}
    told |= {"max_new_tokens": load.tokens, "min_new_tokens": load.tokens}

    def generate() -> None:
        with torch.inference_mode():
            model.generate(ids, **told)

    return generate


def _seconds(way: Callable[[], None]) -> float:
    began = time.perf_counter()
    way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def vllm_python() -> str:
    """The interpreter of an environment with vLLM; nothing where none is found."""
    found = os.environ.get("POTSTILL_VLLM_PYTHON", HERE)
    return found if Path(found).exists() else ""


def main(
    prompts: int = 64,
    prompt_tokens: int = 32,
    tokens: int = 64,
    dtype: str = "float32",
    rounds: int = 3,
    threads: int = 1,
    vllm: str | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Print the rates on a CPU, and write them to a JSON file."""
    torch.set_num_threads(threads)
    # The server's too.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SMALL, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    python = vllm_python() if vllm is None else vllm
    found = measure(model.eval(), Load(prompts, prompt_tokens, tokens), python, rounds)
    print(
        f"{datetime.date.today()}: {sum(w.numel() for w in model.parameters()) / 1e6:.0f} million "
        f"weights in {dtype}, {prompts} prompts of {prompt_tokens} tokens, {tokens} more, "
        f"{threads} threads, medians of {rounds} rounds"
    )
    for row in found:
        print(f"{row['method']:10} {row['tokens/s']:8,.0f} tokens/s  {row['beside potstill']:.2f}")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
