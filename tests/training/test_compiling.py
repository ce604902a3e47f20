"""A student whose layers are compiled: the same numbers but for rounding, one code for all steps,
and one line where nothing can be compiled."""

import os
import subprocess
import sys

import pytest
from conftest import tiny_recipe
from small_runs import rows_of

import potstill
from potstill.config import RecipeError
from potstill.models.lean.activations import layers_of
from potstill.models.lean.compiling import layers_compiled, refuse_compiling


@pytest.mark.slow
# PyTorch's compiler asks every input for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": True, "packing": True}])
def test_a_run_differs_by_rounding_and_compiles_once(tmp_path, more):
    from torch._dynamo.utils import counters

    runs = []
    for compiles in (False, True):
        counters.clear()
        recipe = tiny_recipe(tmp_path / str(compiles), train={"compile": compiles, **more})
        potstill.train(recipe, quiet=True)
        runs.append(rows_of(recipe.out))
        if compiles and not more:
            # One for batches of several rows, and perhaps one for a batch of one.
            assert 1 <= counters["stats"]["unique_graphs"] <= 2
    for one, other in zip(*runs, strict=True):
        for name in ("loss", "grad_norm", "forward_kl"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_so(tmp_path):
    command = [sys.executable, "-m", "potstill", "train", "demo", "--train.compile", "true"]
    command += ["--out", str(tmp_path / "run")]
    bare = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "code")}
    done = subprocess.run(command, env=os.environ | bare, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "train.compile is on, and nothing can be compiled here" in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


def test_several_ranks_are_refused(student):
    with pytest.raises(RecipeError, match=r"train.compile is for one rank, and there are 2"):
        refuse_compiling(student.model, student.device, 2)


def test_a_layer_keeps_a_forward_function_of_its_own(student):
    layer = layers_of(student.model)[0]
    own = layer.forward
    layer.forward = own
    with layers_compiled(student.model):
        assert layer.forward is not own
    assert vars(layer).pop("forward") is own
