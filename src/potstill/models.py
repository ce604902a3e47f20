"""Models as the loop sees them: a backbone that gives hidden states, a head that gives logits, and an end set.

Loading, saving, and the checks that two models can be compared token by token at all.
"""

import contextlib
import copy
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from potstill.heads import Head

if TYPE_CHECKING:
    from potstill.cache import CachedTeacher

ASSETS = Path(__file__).parent / "assets"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class ModelError(ValueError):
    """A model that cannot be used as asked; the message is one line and says what to do."""


class LanguageModel(nn.Module):
    """A Hugging Face causal LM with its tokenizer and its own end tokens. `forward` gives the last hidden states."""

    def __init__(self, model, tokenizer, name: str):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.end_ids = find_end_ids(model, tokenizer)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] after the final norm. Right padding needs no mask: attention is causal."""
        return self.model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state

    @property
    def head(self) -> Head:
        output = self.model.get_output_embeddings()
        config = self.model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(output.weight, getattr(output, "bias", None), scale, softcap)

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def num_weights(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def context_length(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_model(
    name: str, *, dtype: str = "float32", init: str = "pretrained", seed: int = 0, trust_remote_code: bool = False
) -> LanguageModel:
    """Load a folder, a hub id or a shipped model ("potstill:teacher", "potstill:base") in evaluation mode on the CPU.

    `init = "random"` makes fresh weights from the configuration alone. Raises ModelError when the model cannot be read,
    has its weights only as pickle files, or computes logits in a way that hidden states and head do not reproduce.
    """
    import transformers

    path = locate(name)
    if Path(path).is_dir() and init == "pretrained":
        _refuse_pickle(Path(path))
    tokenizer = load_tokenizer(name, trust_remote_code)
    shared: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": getattr(torch, dtype)}
    with _readable(name):
        if init == "random":
            config = load_config(name, trust_remote_code)
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config, **shared)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **shared)
    language_model = LanguageModel(model.eval(), tokenizer, name)
    check_logits(language_model)
    return language_model


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer of a model by its name. Raises ModelError when it cannot be read."""
    import transformers

    with _readable(name):
        return transformers.AutoTokenizer.from_pretrained(locate(name), trust_remote_code=trust_remote_code)


def load_config(name: str, trust_remote_code: bool = False):
    """The configuration of a model by its name. Raises ModelError when it cannot be read."""
    import transformers

    with _readable(name):
        return transformers.AutoConfig.from_pretrained(locate(name), trust_remote_code=trust_remote_code)


def find_folder(name: str) -> Path | None:
    """Where a model's files are on this machine; None when they are not."""
    import huggingface_hub

    folder = ASSETS / name.removeprefix("potstill:") if name.startswith("potstill:") else Path(name)
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def locate(name: str) -> str:
    """The folder or hub id that a name stands for. Raises ModelError where it can stand for nothing."""
    path = str(ASSETS / name.removeprefix("potstill:")) if name.startswith("potstill:") else name
    if name.startswith("potstill:") and not Path(path).is_dir():
        shipped = sorted(f"potstill:{entry.name}" for entry in ASSETS.iterdir() if entry.is_dir())
        raise ModelError(f"{name!r} is not a shipped model; choose one of {', '.join(shipped)}")
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise ModelError(
            f"model folder {name!r} does not exist; give a Hugging Face model folder or a hub id like org/model"
        )
    return path


@contextlib.contextmanager
def _readable(name: str):
    """Quietly; what transformers raises becomes one line."""
    try:
        with without_progress_bars():
            yield
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model {name!r} cannot be loaded: {reason}") from None


def _refuse_pickle(folder: Path) -> None:
    names = [entry.name for entry in folder.iterdir()]
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"model folder {str(folder)!r} has its weights only as pickle ({pickles[0]}), which can run code when "
            "read; convert it to safetensors first"
        )


@contextlib.contextmanager
def without_progress_bars():
    """Without transformers' own progress bars, which would tear ours."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def save_model(model: LanguageModel, state_dict: dict[str, Tensor], end_ids: Sequence[int], folder: Path) -> None:
    """Write a plain Hugging Face folder in safetensors whose generation settings stop at every id of the end set.

    It has its name once it is whole; what a killed attempt left, and a folder of that name, go.
    """
    generation_config = copy.deepcopy(model.model.generation_config)
    generation_config.eos_token_id = list(end_ids) if len(end_ids) > 1 else end_ids[0]
    kept, model.model.generation_config = model.model.generation_config, generation_config
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with without_progress_bars():
            model.model.save_pretrained(unfinished, state_dict=state_dict)
            model.tokenizer.save_pretrained(unfinished)
        # safetensors makes its files readable for their owner alone; the other files have the user's own mode.
        for weights in unfinished.glob("*.safetensors"):
            weights.chmod((unfinished / "config.json").stat().st_mode)
    finally:
        model.model.generation_config = kept
    if folder.is_dir():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def find_end_ids(model, tokenizer) -> tuple[int, ...]:
    """The ids that end a response: of the tokenizer, the generation settings and the chat template, in order."""
    found: list[int | None] = [tokenizer.eos_token_id]
    from_settings = model.generation_config.eos_token_id if model.generation_config else None
    found += from_settings if isinstance(from_settings, list) else [from_settings]
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "potstill"}]
        after = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("potstill")[2]
        ids = tokenizer.encode(after, add_special_tokens=False)
        if ids and ids[0] in tokenizer.all_special_ids:
            found.append(ids[0])
    return tuple(dict.fromkeys(int(i) for i in found if i is not None))


def check_logits(model: LanguageModel) -> None:
    """Raise ModelError unless hidden states and head give the model's own logits, so no scaling is missed."""
    error, allowed = logits_error(model)
    if not error <= allowed:
        raise ModelError(
            f"model {model.name!r}: its logits differ from hidden states times head by {error:.3g} (allowed "
            f"{allowed:.3g}); the architecture changes its logits in a way that potstill does not know"
        )


def logits_error(model: LanguageModel) -> tuple[float, float]:
    """The largest difference of the model's own logits from hidden states times head, and what rounding may make it."""
    vocab_size = model.vocab_size
    ids_BT = torch.arange(8, device=model.device)[None] * (vocab_size // 8)
    with torch.no_grad():
        theirs = model.model(input_ids=ids_BT, use_cache=False).logits.float()
        ours = model.head(model(ids_BT)[0])[None]
    error = (theirs - ours).abs().max().item()
    # bfloat16 keeps 8 bits, and the model rounds its own logits to it.
    allowed = (1e-4 if model.head.weight_VD.dtype == torch.float32 else 2e-2) * theirs.abs().max().clamp(min=1).item()
    return error, allowed


def shared_vocab_size(student: LanguageModel, teacher: "LanguageModel | CachedTeacher") -> int:
    """How many vocabulary rows the two heads share.

    The tokenizers must agree on every id; rows beyond the tokenizer are padding, and the larger head is cut. Raises
    ModelError that names the first ids which differ.
    """
    student_tokens = {i: token for token, i in student.tokenizer.get_vocab().items()}
    teacher_tokens = {i: token for token, i in teacher.tokenizer.get_vocab().items()}
    ids = sorted(student_tokens.keys() | teacher_tokens.keys())
    differing = [i for i in ids if student_tokens.get(i) != teacher_tokens.get(i)]
    if differing:
        shown = ", ".join(f"{i}: {student_tokens.get(i)!r} / {teacher_tokens.get(i)!r}" for i in differing[:3])
        raise ModelError(
            f"the tokenizers of student {student.name!r} and teacher {teacher.name!r} differ at {len(differing)} ids "
            f"(student / teacher: {shown}); a token-level KL needs one vocabulary: choose models of one family"
        )
    size = min(student.vocab_size, teacher.vocab_size)
    if ids[-1] >= size:
        raise ModelError(f"token id {ids[-1]} has no row in a head of {size} rows; the model folder is inconsistent")
    return size


def fingerprint(model: LanguageModel) -> str:
    """A hash of the weights: the same for the same values, wherever they are stored."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
