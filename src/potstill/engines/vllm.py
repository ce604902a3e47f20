"""vLLM as an engine: a server process with an environment of its own, asked over HTTP.

A request is one prompt as token ids with one seed, so it is pure: asked again after a death, with
the same weights, its answer is the same. The recipe of the calls, and what each is for, is in
docs/engines.md.
"""

import copy
import functools
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from potstill.config import EngineSpec, Sampling
from potstill.console.printable import say
from potstill.engines.answers import choices_in, read_completion
from potstill.engines.calls import call_server, is_gone, is_healthy
from potstill.engines.protocol import EngineError
from potstill.engines.server import Server
from potstill.engines.shared import OwnWeights, Weights
from potstill.seeds import Key, step_seed
from potstill.types import Completion
from potstill.wire import Unavailable

# How often a round is asked for before the engine is given up, and seconds between two looks at
# the process.
ATTEMPTS, WATCH_SECONDS = 3, 0.5
# Seconds between two looks for a server that is not ours, at most.
RETRY_SECONDS = 30.0
SERVED_NAME = "potstill"
WORKER = "potstill_worker"
ENVIRONMENT = {
    # Its log is read by people, and nothing is sent anywhere.
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # The calls that take new weights. The server listens on this machine alone.
    "VLLM_SERVER_DEV_MODE": "1",
}


class VllmEngine:
    """vLLM with the weights of `model`, at `spec.url` or in a process that starts with the first
    completion. `folder` keeps its log and its configuration; `weights` are by default the model's
    own."""

    is_native = False
    is_another = True

    def __init__(
        self,
        model,
        spec: EngineSpec,
        folder: Path,
        *,
        dtype: str,
        max_tokens: int,
        weights: Weights | None = None,
    ):
        self.model, self.spec, self.folder = model, spec, folder
        self.weights = weights or OwnWeights(model, folder)
        self.server: Server | None = None
        if spec.url is None:
            folder.mkdir(parents=True, exist_ok=True)
            device = self.weights.device
            command = server_command(
                spec, folder, dtype=dtype, max_tokens=max_tokens, on_cpu=device.type == "cpu"
            )
            self.server = Server(command, environment_of(device, folder), folder / "vllm.log")
        # Weights of another process, or of an earlier life of this run, have another name.
        self.life, self.version = uuid.uuid4().hex[:8], 0
        self.is_asleep = False

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[Key],
        *,
        max_tokens: int | Sequence[int],
        end_ids: Sequence[int],
        sampling: Sampling,
        vocab_size: int | None = None,
        on_token: Callable[[int, int], None] = lambda place, token_id: None,
    ) -> list[Completion]:
        caps = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        bodies = {
            place: request_of(prompt, seed, cap, end_ids, sampling)
            for place, (prompt, seed, cap) in enumerate(zip(prompts, seeds, caps, strict=True))
        }
        read = functools.partial(
            read_completion, end_ids=frozenset(end_ids), vocab_size=vocab_size, sampling=sampling
        )
        found: dict[int, Completion] = {}
        trouble = ""
        for attempt in range(ATTEMPTS if bodies else 0):
            try:
                self._make_ready(vocab_size)
                missing = {place: body for place, body in bodies.items() if place not in found}
                for place, answer in self._answers("/v1/completions", missing, sampling.batch_size):
                    (choice,) = choices_in(answer, 1)
                    found[place] = read(choice, caps[place])
                    for token_id in found[place].token_ids:
                        on_token(place, token_id)
                self._check_version(vocab_size)
                break
            except Unavailable as error:
                trouble = str(error)
                self._recover(trouble, len(bodies) - len(found), attempt)
        else:
            if bodies:
                raise EngineError(self._given_up(trouble))
        return [found[place] for place in range(len(prompts))]

    def update_weights(self, version: int) -> None:
        self.weights.renew(version)
        self.version = version

    def rest(self) -> None:
        """Have the server give up its weights and its cache, where the recipe asks for that."""
        if not self.spec.sleep or self.server is None or not self.server.is_alive or self.is_asleep:
            return
        try:
            self._answer("/sleep?level=2", {})
            self.is_asleep = True
        except Unavailable:
            # It is started anew for the next completion.
            self.server.stop(patience=0)

    def close(self) -> None:
        if self.server is not None:
            self.server.stop()
        self.weights.close()

    @property
    def url(self) -> str:
        return str(self.spec.url) if self.server is None else self.server.url

    @property
    def named_version(self) -> str:
        return f"{self.life}/{self.version}"

    def _make_ready(self, vocab_size: int | None) -> None:
        """Start the server where none runs, and give it the weights where it has others."""
        if self.server is not None and not self.server.is_alive:
            config = copy.deepcopy(self.model.config)
            # As in a checkpoint; a model that was made in Python has none there.
            config.architectures = [type(self.model).__name__]
            config.save_pretrained(self.folder)
            # Beside the log, and not from its own folder, whose modules are named as others are.
            shutil.copy(Path(__file__).with_name(f"{WORKER}.py"), self.folder)
            self.server.start(self.spec.timeout)
            self.is_asleep = False
        if self.is_asleep:
            # Room for weights, which come before there is a cache to compute with them.
            self._answer("/wake_up?tags=weights", {})
        if self.is_asleep or self._version_there(vocab_size) != self.named_version:
            self._push()
            self._check_version(vocab_size)
        if self.is_asleep:
            self._answer("/wake_up?tags=kv_cache", {})
            self.is_asleep = False

    def _version_there(self, vocab_size: int | None) -> str:
        """The version of the weights that the server writes with; it draws ids below `vocab_size`
        from now on."""
        versions = set(self._call_workers("potstill_state", vocab_size or 0))
        return versions.pop() if len(versions) == 1 else f"several: {sorted(versions)}"

    def _check_version(self, vocab_size: int | None) -> None:
        there = self._version_there(vocab_size)
        if there != self.named_version:
            raise EngineError(
                f"the engine at {self.url} has weights {there!r} and the step's are "
                f"{self.named_version!r}; let nothing else use that server"
            )

    def _push(self) -> None:
        """Give the server the model's weights, and have it forget what the old ones computed."""
        try:
            with self.weights.files() as folder:
                self._call_workers("potstill_reload", str(folder), self.named_version)
            # After the weights: what is in the cache then is of the old ones.
            self._answer("/reset_prefix_cache", {})
        except Unavailable:
            # Nobody knows which weights are there now.
            if self.server is not None:
                self.server.stop(patience=0)
            raise

    def _call_workers(self, method: str, *arguments: Any) -> list[str]:
        body = {"method": method, "args": list(arguments)}
        return self._answer("/collective_rpc", body)["results"]

    def _answer(self, path: str, body: dict[str, Any]) -> Any:
        ((_, answer),) = self._answers(path, {0: body}, 1)
        return answer

    def _answers(
        self, path: str, bodies: Mapping[int, dict[str, Any]], at_once: int
    ) -> Iterator[tuple[int, Any]]:
        """Answers as they come, each with the number of its question; so many are asked at once.
        Raises Unavailable as soon as one has no answer or the server is gone."""
        pool = ThreadPoolExecutor(at_once)
        try:
            waiting: dict[Future[Any], int] = {
                pool.submit(call_server, self.url, path, body, seconds=self.spec.timeout): number
                for number, body in bodies.items()
            }
            while waiting:
                done, _ = wait(waiting, WATCH_SECONDS, FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
                # A server whose core has died waits for our connections, and we for its answers.
                if waiting and is_gone(self.url):
                    raise Unavailable("it has ended, or says that it cannot go on")
        finally:
            # Not waited for: what still hangs ends with the server, or by its time-out.
            pool.shutdown(wait=False, cancel_futures=True)

    def _recover(self, trouble: str, num_left: int, attempt: int) -> None:
        """Bring a server back that has failed, or wait for one that is not ours."""
        if self.server is not None:
            if not is_healthy(self.url):
                say(
                    f"the engine has died ({trouble[:200]}); it is started again, and "
                    f"{num_left} completions are written anew",
                    error=True,
                )
                self.server.stop(patience=0)
            return
        deadline = time.monotonic() + self.spec.timeout
        pause = 2.0**attempt / 4
        while not is_healthy(self.url) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS)

    def _given_up(self, trouble: str) -> str:
        log = "" if self.server is None else f"; {self.server.end_of_log()}"
        return (
            f"the engine at {self.url} failed {ATTEMPTS} times ({trouble[:300]}); what is saved is "
            f"kept, and the same command goes on from there{log}"
        )


def server_command(
    spec: EngineSpec, folder: Path, *, dtype: str, max_tokens: int, on_cpu: bool
) -> list[str]:
    """vLLM's server for a model whose configuration is in a folder, without weights at first."""
    # A seeded draw that a cut prompt throws away ends the CPU's engine: it reads prompts whole.
    whole = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(max_tokens, 2048)))
    python = Path(shutil.which(spec.python) or spec.python).absolute()
    return [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder.resolve()), "--load-format", "dummy", "--skip-tokenizer-init"),
        *("--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--dtype", dtype),
        *("--max-model-len", str(max_tokens)),
        # Log-probabilities of the distribution that is drawn from; no settings of the folder's.
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *((*whole, "--enforce-eager") if on_cpu else ()),
        *("--worker-extension-cls", f"{WORKER}.Extension"),
        *("--logits-processors", f"{WORKER}:FirstRows"),
        *(("--enable-sleep-mode",) if spec.sleep else ()),
        *spec.args,
    ]


def environment_of(device: torch.device, folder: Path) -> dict[str, str]:
    """Variables of the server's process, which computes where the model is; what it imports of ours
    is in the folder."""
    found = ENVIRONMENT | {"PYTHONPATH": str(folder.resolve())}
    if device.type == "cpu":
        # GiB; by default vLLM takes a share of all memory.
        return found | {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return found | {"CUDA_VISIBLE_DEVICES": names[device.index or 0]}


def request_of(
    prompt: Sequence[int], seed: Key, cap: int, end_ids: Sequence[int], sampling: Sampling
) -> dict[str, Any]:
    """The body of a request for one completion."""
    return {
        "model": SERVED_NAME,
        "prompt": list(prompt),
        "max_tokens": cap,
        "seed": step_seed("engine", *seed),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        # No other tokens than the drawn one.
        "logprobs": 0,
        # Our end set alone ends a completion.
        "stop_token_ids": list(end_ids),
        "ignore_eos": True,
        "detokenize": False,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
