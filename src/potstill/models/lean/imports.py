"""Libraries that a process need not load."""

import sys
from typing import Any

import torch


def auto_model() -> Any:
    """The class of transformers that loads any causal LM, imported without Triton where no device
    could run its kernels.

    Models load PyTorch's compiler, which loads Triton to know its types; that takes 70 MB. PyTorch
    then takes Triton as not installed. Whoever else imports it has it.
    """
    is_hidden = "triton" not in sys.modules and not torch.accelerator.is_available()
    if is_hidden:
        # For an import this means that there is no such module.
        sys.modules["triton"] = None  # pyright: ignore[reportArgumentType]
    try:
        import transformers.modeling_utils
    finally:
        if is_hidden:
            del sys.modules["triton"]
    return transformers.AutoModelForCausalLM
