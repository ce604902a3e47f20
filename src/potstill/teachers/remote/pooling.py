"""The wire of a teacher elsewhere: last hidden states, as a pooling server of vLLM gives them.

A request is some rows of token ids, so it is pure. The answer is their states after the final norm,
one an id, as raw numbers; a header says where each row is. `potstill serve` speaks the same.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.types import ModelError, NonFiniteError
from potstill.wire import Answer, Unavailable

PATH = "/pooling"
# Rows that our own server takes at once, and tokens that they may have with what it draws after
# them.
MAX_ROWS, MAX_DRAWN = 64, 2**18
# The server scales rows to length 1 where it is not told to leave them.
LENGTH_ONE = 1e-3


def states_request(ids: Sequence[Sequence[int]], dtype: str) -> dict[str, Any]:
    """The body of a request for the states of some rows of ids, of type `dtype` on the wire, but
    for the model's name."""
    return {
        "input": [list(row) for row in ids],
        "task": "token_embed",
        "use_activation": False,
        "encoding_format": "bytes",
        "embed_dtype": dtype,
        "endianness": "little",
    }


def read_states(
    answer: Answer, lengths: Sequence[int], width: int, dtype: str, url: str
) -> list[Tensor]:
    """The states [T, E] of each row, on the CPU.

    Raises Unavailable for a cut body, NonFiniteError for numbers that are not finite, and
    ModelError for states that are not those of this teacher's head.
    """
    if answer.status != 200:
        raise ModelError(
            f"the teacher at {url} refuses {PATH} (status {answer.status}): {answer.text}"
        )
    item = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    places = _places(answer, url)
    if len(places) != len(lengths):
        raise ModelError(
            f"the teacher at {url} gave {len(places)} rows for {len(lengths)}; start it as "
            "docs/teachers.md says"
        )
    states = []
    for (_, start, end, shape), length in zip(places, lengths, strict=True):
        if shape != [length, width]:
            raise ModelError(
                f"the teacher at {url} gave states of shape {shape} for {length} ids, and "
                f"the head of teacher.model takes [{length}, {width}]; name the model that the "
                "server has"
            )
        data = answer.body[start:end]
        if len(data) != length * width * item:
            raise Unavailable(f"{PATH}: a row has {len(data)} bytes of {length * width * item}")
        row_TE = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype))
        states.append(row_TE.view(length, width))
    _check(torch.cat(states), url)
    return states


def _places(answer: Answer, url: str) -> list[tuple[int, int, int, list[int]]]:
    """Number, first byte, last byte and shape of each row, in the order of the numbers."""
    try:
        rows = json.loads(answer.headers["metadata"])["data"]
        return sorted(
            (int(row["index"]), int(row["start"]), int(row["end"]), row["shape"]) for row in rows
        )
    except (KeyError, TypeError, ValueError):
        raise ModelError(
            f"the teacher at {url} answers {PATH} without the header `metadata`, which says where "
            "each row is; start it as docs/teachers.md says"
        ) from None


def _check(states_NE: Tensor, url: str) -> None:
    states_NE = states_NE.float()
    if not bool(torch.isfinite(states_NE).all()):
        raise NonFiniteError(f"the hidden states of the teacher at {url} are not finite")
    norms_N = states_NE.norm(dim=-1)
    if bool(((norms_N - 1).abs() < LENGTH_ONE).all()):
        raise ModelError(
            f"the teacher at {url} gives rows of length 1, no hidden states: its activation is "
            'on; start it with --pooler-config \'{"task": "token_embed", "use_activation": false}\''
        )
