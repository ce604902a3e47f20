"""The application of `potstill serve`: hidden states as vLLM's pooling server gives them, and
completions."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from potstill.config import Sampling
from potstill.models.language_model import LanguageModel
from potstill.models.sampling import sample
from potstill.seeds import Key
from potstill.serving.limits import App, Limits
from potstill.teachers.remote.pooling import MAX_DRAWN, MAX_ROWS
from potstill.types import Completion, NonFiniteError

# Limits of a request: ids of a row where the model has none, and bytes of its body.
MAX_IDS, MAX_BYTES = 2**17, 2**24
# Seconds for each part of a body, and for a client to take each part of an answer.
SECONDS = 30.0
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_IDS)]
Cap = Annotated[int, Field(ge=1, le=MAX_IDS)]
# The numbers that name a row's random stream; of a cached text they have 128 bits.
SeedKey = Annotated[list[Annotated[int, Field(ge=0, lt=2**128)]], Field(min_length=1, max_length=8)]


class StrictModel(BaseModel):
    """A request. Fields that are not known are refused, as their sender means something by them."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None


class StatesAsked(StrictModel):
    """A request for hidden states: rows of ids."""

    input: Annotated[list[Ids], Field(min_length=1, max_length=MAX_ROWS)]
    task: Literal["token_embed"] = "token_embed"
    use_activation: Literal[False] = False
    encoding_format: Literal["bytes"] = "bytes"
    embed_dtype: Literal["float32", "bfloat16"] = "float32"
    endianness: Literal["little", "native"] = "little"


class CompletionAsked(StrictModel):
    """A request for completions, drawn exactly: one, of a prompt of ids, or one of each row of ids,
    with lists of as many seeds and caps. The seed of a row is a list of numbers."""

    prompt: Ids | Annotated[list[Ids], Field(min_length=1, max_length=MAX_ROWS)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] | list[SeedKey] = 0
    max_tokens: Cap | list[Cap] = 16
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    vocab_size: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class AskedRow:
    """A row to write to: its ids, the key of its random numbers, and its cap."""

    prompt: tuple[int, ...]
    key: Key
    cap: int


class Refused(Exception):
    """A request that is well formed and cannot be answered."""


def make_app(model: LanguageModel, fingerprint: str, token: str | None = None) -> App:
    """The application around a model that is ready. One request is computed at a time, so that no
    answer depends on the others."""
    app = FastAPI(title="potstill serve", docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = threading.Lock()
    limit = min(model.context_length or MAX_IDS, MAX_IDS)
    told = {"id": model.name, "object": "model", "fingerprint": fingerprint, "max_model_len": limit}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [told]}

    @app.post("/pooling")
    async def pooling(asked: StatesAsked) -> Response:
        return await run_in_threadpool(_answer_states, asked)

    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked) -> dict[str, Any]:
        return await run_in_threadpool(_answer_completion, asked)

    def _answer_states(asked: StatesAsked) -> Response:
        _refuse_ids(model, asked.input, limit)
        with one_at_a_time:
            states = hidden_states(model, asked.input)
        dtype = getattr(torch, asked.embed_dtype)
        parts, rows, start = [], [], 0
        for index, row_TE in enumerate(states):
            data = row_TE.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
            place = {"index": index, "start": start, "end": start + len(data)}
            rows.append(place | {"shape": list(row_TE.shape)})
            parts.append(data)
            start += len(data)
        metadata = json.dumps({"data": rows}, separators=(",", ":"))
        headers = {"metadata": metadata}
        return Response(b"".join(parts), headers=headers, media_type="application/octet-stream")

    def _answer_completion(asked: CompletionAsked) -> dict[str, Any]:
        rows = asked_rows(asked)
        for row in rows:
            _refuse_ids(model, [row.prompt], limit, row.cap)
        with one_at_a_time:
            return drawn_completions(model, asked, rows)

    app.add_exception_handler(Refused, _say(400))
    app.add_exception_handler(NonFiniteError, _say(500))
    app.add_exception_handler(RequestValidationError, _say(422))
    return Limits(app, token=token, max_bytes=MAX_BYTES, seconds=SECONDS)


def _say(status: int):
    """A handler that answers with an error's words, and nothing of the request itself."""

    async def handler(request: Request, error: Exception) -> JSONResponse:
        says = str(error)
        if isinstance(error, RequestValidationError):
            each = error.errors()[0]
            says = f"{'.'.join(map(str, each['loc']))}: {each['msg']}"
        return JSONResponse({"error": {"message": says[:500]}}, status_code=status)

    return handler


def asked_rows(asked: CompletionAsked) -> list[AskedRow]:
    """The rows of a request. Raises Refused where the lists do not belong together, and where all
    of it is too much at once."""
    prompts = [row for row in asked.prompt if isinstance(row, list)]
    if not prompts:
        if isinstance(asked.seed, list) or isinstance(asked.max_tokens, list):
            raise Refused("seed and max_tokens are lists, and prompt is no list of rows")
        ids = tuple(each for each in asked.prompt if isinstance(each, int))
        return [AskedRow(prompt=ids, key=(asked.seed,), cap=asked.max_tokens)]
    num, caps = len(prompts), asked.max_tokens
    caps = [caps] * num if isinstance(caps, int) else caps
    if not isinstance(asked.seed, list) or not len(asked.seed) == len(caps) == num:
        raise Refused(f"prompt has {num} rows; give as many seeds, each a list, and as many caps")
    rows = [
        AskedRow(prompt=tuple(prompt), key=tuple(key), cap=cap)
        for prompt, key, cap in zip(prompts, asked.seed, caps, strict=True)
    ]
    longest = max(len(row.prompt) + row.cap for row in rows)
    if num > 1 and num * longest > MAX_DRAWN:
        raise Refused(f"{num} rows of up to {longest} tokens are more than {MAX_DRAWN} in all")
    return rows


def _refuse_ids(
    model: LanguageModel, rows: Sequence[Sequence[int]], limit: int, max_tokens: int = 0
) -> None:
    largest, longest = max(map(max, rows)), max(map(len, rows))
    if largest >= model.vocab_size:
        raise Refused(f"an id is {largest} and the model has {model.vocab_size} tokens")
    if longest + max_tokens > limit:
        more = f" and max_tokens is {max_tokens}" if max_tokens else ""
        raise Refused(f"a row has {longest} ids{more}; {limit} tokens are the most that fit")


@torch.inference_mode()
def hidden_states(model: LanguageModel, rows: list[list[int]]) -> list[torch.Tensor]:
    """The states [T, E] of each row after the final norm, on the CPU; right padding needs no
    mask."""
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row)] = torch.tensor(row)
    states_BTE = model(ids_BT.to(model.device)).cpu()
    return [states_BTE[b, : len(row)] for b, row in enumerate(rows)]


def drawn_completions(
    model: LanguageModel, asked: CompletionAsked, rows: Sequence[AskedRow]
) -> dict[str, Any]:
    """Completions with their log-probabilities, as vLLM's server words them."""
    settings = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k}
    written = sample(
        model.model,
        [row.prompt for row in rows],
        [row.key for row in rows],
        max_tokens=[row.cap for row in rows],
        end_ids=asked.stop_token_ids,
        sampling=Sampling(**settings, batch_size=len(rows)),
        vocab_size=asked.vocab_size,
    )
    choices = [_choice(index, completion) for index, completion in enumerate(written)]
    return {"object": "text_completion", "model": model.name, "choices": choices}


def _choice(index: int, written: Completion) -> dict[str, Any]:
    has_ended = written.stop == "end"
    return {
        "index": index,
        "token_ids": written.token_ids,
        "finish_reason": "stop" if has_ended else "length",
        "stop_reason": written.token_ids[-1] if has_ended else None,
        "logprobs": {"token_logprobs": written.log_probs},
    }
