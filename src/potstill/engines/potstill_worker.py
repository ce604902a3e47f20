"""A worker of vLLM that takes new weights and draws from the first rows of a head alone.

vLLM's process imports a copy of this file, in an environment without potstill.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm.v1.sample.logits_processor import LogitsProcessor  # pyright: ignore[reportMissingImports]


class Extension:
    """Methods that are added to vLLM's worker, which has `reload_weights`. What they return is sent
    as text."""

    potstill_version = "none"

    def potstill_reload(self, folder: str, version: str) -> str:
        """Read all weights of a folder; `version` names them from now on."""
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            # vLLM itself takes no weights at all for a success.
            raise FileNotFoundError(f"{folder} has no weights")
        # Half-read weights have no name.
        self.potstill_version = "none"
        tensors = (named for file in files for named in load_file(file).items())
        self.reload_weights(weights_iterator=tensors)  # pyright: ignore[reportAttributeAccessIssue]
        self.potstill_version = version
        return version

    def potstill_state(self, num_rows: int) -> str:
        """The version of the weights. From now on only ids below `num_rows` are drawn; all for
        0."""
        FirstRows.num_rows = num_rows or None
        return self.potstill_version


class FirstRows(LogitsProcessor):
    """Keeps the rows of a head that have no token from being drawn."""

    num_rows: int | None = None

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.num_rows is not None:
            logits[:, self.num_rows :] = -torch.inf
        return logits
