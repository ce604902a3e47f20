"""Libraries that loading a model leaves alone."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from potstill.models.language_model import load_model
load_model("potstill:base")
assert "torch._dynamo" in sys.modules, "models load PyTorch's compiler"
assert "triton" not in sys.modules
import triton
compiled = torch.compile(lambda x: (x * 2).sin().sum())
assert torch.allclose(compiled(torch.ones(9)), torch.full((9,), 2.0).sin().sum())
"""


@pytest.mark.slow
def test_a_process_without_a_gpu_loads_no_triton_and_can_still_compile():
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=300)
