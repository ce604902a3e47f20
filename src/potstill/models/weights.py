"""Faults of a model's weights: missing, cut short, not finite, too coarse for their learning
rate."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.types import ModelError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
LFS_POINTER = b"version https://git-lfs"
# So many names are shown of a list of weights.
NUM_SHOWN_WEIGHTS = 3
# The share of the weights that a step should be able to change.
FEW_MOVE = 0.9
# Names in configurations for the weight of the loss that spreads tokens over experts.
ROUTER_LOSSES = ("router_aux_loss_coef", "aux_loss_coef")


def refuse_checkpoint(folder: Path) -> None:
    """Raise ModelError for a checkpoint of a run, which has weights and no model about them."""
    run = folder.parent.parent
    if folder.parent.name == "checkpoint" and (run / "recipe.toml").exists():
        raise ModelError(
            f"{str(folder)!r} is a checkpoint, from which its run goes on, and no model; name the "
            f"run {str(run)!r} once it is finished, or let the checkpoint write a cache "
            "(`potstill cache build --writer student --model CHECKPOINT`)"
        )


def refuse_foreign_files(folder: Path) -> None:
    """Raise ModelError for weights as pickle files alone, and for pointers of git-lfs."""
    paths = sorted(folder.iterdir())
    pickles = [path.name for path in paths if path.name.endswith(PICKLE_SUFFIXES)]
    if pickles and not any(path.suffix == ".safetensors" for path in paths):
        raise ModelError(
            f"model folder {str(folder)!r} has its weights only as pickle ({pickles[0]}), which "
            "can run code when read; convert it to safetensors first"
        )
    for path in paths:
        if path.is_file() and _starts_with(path, LFS_POINTER):
            raise ModelError(
                f"{str(path)!r} is a pointer of git-lfs and not the file itself; run `git lfs "
                "pull` in its folder"
            )


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def refuse_unread_settings(folder: Path) -> None:
    """Raise ModelError for generation settings that are no JSON object; transformers would do
    without them unasked."""
    path = folder / "generation_config.json"
    if not path.exists():
        return
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{str(path)!r} is damaged ({error}); get the file again, or remove it"
        ) from None
    if not isinstance(settings, dict):
        raise ModelError(
            f"{str(path)!r} is damaged (not a JSON object); get the file again, or remove it"
        )


def refuse_unread_file(folder: Path) -> None:
    """Raise ModelError that names the first safetensors file that is damaged or cut."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{str(path)!r} is damaged or cut ({reason}); get the file again"
            ) from None


def refuse_wrong_weights(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    """Raise ModelError if `info`, what transformers tells of loading, has weights that are missing
    or do not fit.

    Weights that are tied to others are not missing. Files may hold what this architecture has no
    use for, such as the eyes of a model that is used for text, but not more layers than the
    configuration has.
    """
    unexpected = set(info["unexpected_keys"])
    if missing := set(info["missing_keys"]):
        held = f" and hold {_listed(unexpected)} instead (is there a prefix?)" if unexpected else ""
        raise ModelError(
            f"model {name!r}: its files lack {_listed(missing)}{held}; these would be drawn at "
            "random: get the whole model"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        key, in_file, in_model = mismatched[0]
        raise ModelError(
            f"model {name!r}: {len(mismatched)} weights have another size in its files than its "
            f"config.json says ({key}: {list(in_file)} there, {list(in_model)} by config.json); "
            "the two do not belong together"
        )
    places = {_without_numbers(key) for key in model.state_dict()}
    if more := {key for key in unexpected if _without_numbers(key) in places or "lora_" in key}:
        raise ModelError(
            f"model {name!r}: its files hold {_listed(more)}, for which its config.json has no "
            "place; they would be left out: the two do not belong together"
        )
    if info["error_msgs"]:
        raise ModelError(
            f"model {name!r} cannot be loaded: {' '.join(str(info['error_msgs'][0]).split())[:300]}"
        )


def _without_numbers(key: str) -> str:
    return re.sub(r"\d+", "0", key)


def _listed(keys: Collection[str]) -> str:
    shown = ", ".join(sorted(keys)[:NUM_SHOWN_WEIGHTS])
    more = ", ..." if len(keys) > NUM_SHOWN_WEIGHTS else ""
    return f"{len(keys)} weight{'s' if len(keys) > 1 else ''} ({shown}{more})"


@torch.no_grad()
def refuse_non_finite(name: str, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise ModelError that names the first tensor with a NaN or an infinity in it."""
    for key, weight in parameters:
        if weight.is_floating_point() and weight.numel():
            # Takes no memory for itself, and a NaN anywhere is in both ends.
            low, high = torch.aminmax(weight)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ModelError(
                    f"model {name!r}: the weights are not finite: {key} holds "
                    f"{_non_finite_value(weight)}; the files are damaged or a training has "
                    "diverged: get or train the model again"
                )


def _non_finite_value(weight: torch.Tensor) -> str:
    num_nan, num_inf = int(weight.isnan().sum()), int(weight.isinf().sum())
    return " and ".join(
        f"{num} {what}" for num, what in ((num_nan, "NaN"), (num_inf, "infinite")) if num
    )


def weights_fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of weights by their names: the same for the same values, wherever they are stored."""
    digest = hashlib.sha256()
    for name, parameter in sorted(weights):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@torch.no_grad()
def share_that_moves(weights: Iterable[torch.Tensor], step: float) -> float:
    """The share of weights that change when `step` is added to each or taken from it.

    A bfloat16 weight keeps 8 bits: it changes if the step is at least half of the distance to the
    next one, and else is rounded back to what it was.
    """
    num = num_moved = 0
    for weight in weights:
        num += weight.numel()
        if weight.dtype != torch.bfloat16:
            num_moved += weight.numel()
            continue
        # |w| = m * 2^e with m in [0.5, 1), so that the next one is 2^(e - 8) away.
        mantissa, exponent = torch.frexp(weight.float().abs())
        half = torch.ldexp(torch.ones_like(mantissa), exponent - 9)
        num_moved += int(((half <= step) | (mantissa == 0)).sum())
    return num_moved / max(num, 1)


def cautions(model: Any, lr: float, rounds_by_chance: bool = False) -> list[str]:
    """Warnings about training this Hugging Face model at a peak learning rate, for a user to read
    before it begins. No small update is lost where weights are rounded by chance."""
    lines = []
    share = share_that_moves([w for w in model.parameters() if w.requires_grad], lr)
    if share < FEW_MOVE and not rounds_by_chance:
        lines.append(
            "warning: the student's weights are in bfloat16, which rounds small updates away: a "
            f'step of {lr:g} can change {share:.2%} of them; use student.dtype = "float32" with '
            'train.compute_dtype = "bfloat16", or train.stochastic_rounding = true'
        )
    config = model.config.get_text_config()
    for name in ROUTER_LOSSES:
        if weight := getattr(config, name, None):
            lines.append(
                f"the student is a mixture of experts: its router's load-balancing loss ({name} "
                f"= {weight:g}) is not part of the loss of this training"
            )
    return lines
