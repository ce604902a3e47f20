"""Models as the loop sees them: a backbone that gives hidden states, a head that gives logits, and
an end set.

Loading, saving, and the checks that two models can be compared token by token at all.
"""

import contextlib
import copy
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from potstill.console.names import nearest
from potstill.console.printable import error_text
from potstill.console.quiet import without_progress_bars, without_warnings
from potstill.hub import cache_first, cannot_be_had, is_reachable
from potstill.kl.head import Head
from potstill.models import adapters
from potstill.models.batch import Batch
from potstill.models.flops import ModelFlops, model_flops
from potstill.models.lean.attention import set_attention
from potstill.models.lean.imports import auto_model
from potstill.models.lean.quantized import (
    is_quantized,
    leave_as_stored,
    make_whole,
    plain_tensors,
    type_to_load,
)
from potstill.models.templates import ChatTemplate, TemplateError
from potstill.models.weights import (
    refuse_checkpoint,
    refuse_foreign_files,
    refuse_unread_file,
    refuse_unread_settings,
    refuse_wrong_weights,
    weights_fingerprint,
)
from potstill.runs.run_folder import resume_command
from potstill.types import ModelError

ASSETS = Path(__file__).parent.parent / "assets"
# Names in configurations of the factors that logits are multiplied with or divided by, and of their
# soft cap.
MULTIPLIED = ("logit_scale", "lm_head_multiplier")
DIVIDED = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class LanguageModel(nn.Module):
    """A Hugging Face causal LM with its tokenizer and its own end tokens. `forward` gives the last
    hidden states.

    `is_probed` says whether `probe.probe` has found that all this holds for the model. `digest` is
    the hash of weights that do not stay as they were: a quantised model packs them anew at its
    first pass.
    """

    def __init__(self, model, tokenizer, name: str):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.end_ids = find_end_ids(model, tokenizer)
        self.is_probed = False
        self.digest = weights_fingerprint(plain_tensors(model)) if is_quantized(model) else None
        self.training = model.training

    def around(self, model, name: str) -> "LanguageModel":
        """The same for another copy of the model, which needs no probe of its own."""
        other = LanguageModel(model, self.tokenizer, name)
        other.is_probed, other.digest = self.is_probed, self.digest
        return other

    @property
    def backbone(self) -> Any:
        """All but the head."""
        found = self.model.base_model
        # Where an architecture names its backbone otherwise than it says, transformers gives the
        # whole model back.
        return getattr(self.model, "model", found) if found is self.model else found

    def forward(self, input_ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] after the final norm. Right padding needs no mask: attention is
        causal. Positions tell packed rows apart."""
        packed = {} if positions_BT is None else {"position_ids": positions_BT}
        return self.backbone(input_ids=input_ids_BT, use_cache=False, **packed).last_hidden_state

    def signal_at(self, batch: Batch) -> Tensor:
        """As a teacher: hidden states [N, E] at a batch's loss tokens."""
        return self(*batch.teacher_inputs)[batch.teacher_mask_BT]

    @property
    def can_score(self) -> bool:
        return True

    @property
    def decoder(self) -> Any:
        """The module that writes: the model itself."""
        return self.model

    @property
    def flops(self) -> ModelFlops:
        """The operations of a forward pass."""
        return model_flops(self.backbone, self.head, self.model.config.get_text_config())

    def weights_digest(self) -> str:
        return fingerprint(self)

    @property
    def head(self) -> Head:
        """The head that gives logits; the probe measures whether it gives the model's own."""
        output = self.model.get_output_embeddings()
        config = self.model.config.get_text_config()
        multiplied, divided = (_product(config, names) for names in (MULTIPLIED, DIVIDED))
        # The one architecture that multiplies with what others divide by.
        scale = multiplied * divided if config.model_type == "hyperclovax" else multiplied / divided
        softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
        return Head(
            output.weight, bias_V=getattr(output, "bias", None), scale=scale, softcap=softcap
        )

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def num_weights(self) -> int:
        if is_quantized(self.model):
            # Several of them may be packed into one number.
            return self.model.num_parameters()
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def context_length(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def _product(config, names: Sequence[str]) -> float:
    """The product of the factors that a configuration has."""
    return math.prod(float(getattr(config, name, None) or 1.0) for name in names)


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    init: str = "pretrained",
    seed: int = 0,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> LanguageModel:
    """Load a folder, a run's folder, a hub id or a shipped model ("potstill:teacher",
    "potstill:base") on the CPU.

    `init = "random"` makes fresh weights from the configuration alone. The model is in evaluation
    mode, and not probed (`probe.ready` does both). Raises ModelError when the model cannot be read,
    is not whole, or has its weights only as pickle files.
    """
    path = locate(name)
    if Path(path).is_dir() and init == "pretrained":
        refuse_foreign_files(Path(path))
        refuse_unread_settings(Path(path))
        if (base := adapters.base_of(Path(path))) is not None:
            model = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code)
            return _with_adapter(name, model, load_tokenizer(name, trust_remote_code))
    tokenizer = load_tokenizer(name, trust_remote_code)
    config = load_config(name, trust_remote_code)
    shared: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "dtype": type_to_load(config, dtype),
    }
    auto = auto_model()
    with _readable(name):
        if init == "random":
            torch.manual_seed(seed)
            model = auto.from_config(config, **shared)
            set_attention(name, model, attention)
            return LanguageModel(model.eval(), tokenizer, name)
        # Other sizes are refused below, with the names of the weights.
        shared |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
        loaded: Any = auto.from_pretrained(path, output_loading_info=True, **shared)
        model, info = loaded
        refuse_wrong_weights(name, model, info)
        leave_as_stored(model)
        set_attention(name, model, attention)
        if adapters.has_adapter(model):
            # A hub's, beside its base: transformers follows the name.
            adapters.merge_in_place(model)
            model.name_or_path = ""
        return LanguageModel(model.eval(), tokenizer, name)


def _with_adapter(name: str, base: LanguageModel, tokenizer) -> LanguageModel:
    """The adapter in a folder, merged into its base, which loses its name: it is in no folder."""
    import transformers

    folder = Path(locate(name))
    with _readable(name):
        make_whole(base.model)
        model = adapters.merge_from(folder, base.model)
        if (folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.name_or_path = ""
    return LanguageModel(model.requires_grad_(True).eval(), tokenizer, name)


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer of a model by its name. Raises ModelError when it cannot be read."""
    import transformers

    path = locate(name)
    base = adapters.base_of(Path(path))
    if base is not None and not (Path(path) / "tokenizer_config.json").exists():
        return load_tokenizer(base, trust_remote_code)
    with _readable(name):
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_config(name: str, trust_remote_code: bool = False):
    """The configuration of a model by its name. Raises ModelError when it cannot be read."""
    import transformers

    path = locate(name)
    if (base := adapters.base_of(Path(path))) is not None:
        return load_config(base, trust_remote_code)
    with _readable(name):
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def find_folder(name: str) -> Path | None:
    """Where a model's files are on this machine; None when they are not."""
    import huggingface_hub

    folder = _as_folder(name)
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def locate(name: str) -> str:
    """The folder or hub id that a name stands for. Raises ModelError where it can stand for
    nothing."""
    if not name:
        raise ModelError(
            "the name of a model is empty; give a model folder, a run folder or a hub id like "
            "org/model"
        )
    folder = _as_folder(name)
    if folder.is_dir():
        return str(folder)
    if name.startswith("potstill:"):
        shipped = sorted(f"potstill:{entry.name}" for entry in ASSETS.iterdir() if entry.is_dir())
        raise ModelError(f"{name!r} is not a shipped model; choose one of {', '.join(shipped)}")
    if "/" not in name and not name.startswith((".", "~")):
        raise ModelError(
            f"model {name!r} is no folder here, and a hub id has an owner, as "
            "openai-community/gpt2 has; give a model folder, a run folder or such an id"
        )
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model folder {name!r} does not exist; give a Hugging Face model folder, a run "
            "folder or a hub id like org/model"
        )
    if folder.parent.is_dir() and find_folder(name) is None:
        # A slip of the pen in a path must not be asked of the hub.
        beside = nearest(
            folder.name, [entry.name for entry in folder.parent.iterdir() if entry.is_dir()], 0.6
        )
        hint = f"; the nearest is {str(folder.parent / beside)!r}" if beside else ""
        where = f"in the folder {str(folder.parent)!r}"
        raise ModelError(
            f"model folder {name!r} does not exist {where}, and so it is no hub id{hint}"
        )
    return name


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, whose model is in its folder `model`."""
    return (folder / "recipe.toml").exists()


def _as_folder(name: str) -> Path:
    """The folder that a name would be: of a shipped model, of a run's model, or its own. It need
    not exist.

    Raises ModelError for a run that is not finished, and for a checkpoint.
    """
    if name.startswith("potstill:"):
        return ASSETS / name.removeprefix("potstill:")
    folder = Path(name)
    if not is_run(folder):
        refuse_checkpoint(folder)
        return folder
    if not (folder / "DONE").exists():
        raise ModelError(
            f"run {name!r} is not finished; run `{resume_command(folder)}` to finish it"
        )
    return folder / "model"


@contextlib.contextmanager
def _readable(name: str):
    """Quietly; whatever transformers raises of files that are not ours becomes one line."""
    is_here = Path(locate(name)).is_dir()
    try:
        with (
            without_progress_bars(),
            without_warnings(),
            contextlib.nullcontext() if is_here else cache_first(),
        ):
            yield
    except Exception as error:
        if isinstance(error, ModelError):
            raise
        if not is_here and not is_reachable():
            raise ModelError(cannot_be_had("model", name)) from None
        folder = find_folder(name)
        if folder is not None:
            refuse_foreign_files(folder)
            refuse_unread_file(folder)
        raise ModelError(f"model {name!r} cannot be loaded: {error_text(error, 300)}") from None


def save_model(
    model: LanguageModel,
    state_dict: dict[str, Tensor],
    end_ids: Sequence[int],
    folder: Path,
) -> None:
    """Write a plain Hugging Face folder in safetensors whose generation settings stop at every id
    of the end set.

    Where the weights are those of the model's adapter alone, the folder is peft's. It has its name
    once it is whole; what a killed attempt left, and a folder of that name, go.
    """
    generation_config = copy.deepcopy(model.model.generation_config)
    generation_config.eos_token_id = list(end_ids) if len(end_ids) > 1 else end_ids[0]
    kept, model.model.generation_config = model.model.generation_config, generation_config
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with without_progress_bars():
            if all(map(adapters.is_of_adapter, state_dict)):
                adapters.write_adapter(model.model, state_dict, unfinished)
                generation_config.save_pretrained(unfinished)
            else:
                model.model.save_pretrained(unfinished, state_dict=state_dict)
            model.tokenizer.save_pretrained(unfinished)
        # safetensors makes its files readable for their owner alone; the other files have the
        # user's own mode.
        for weights in unfinished.glob("*.safetensors"):
            weights.chmod((unfinished / "generation_config.json").stat().st_mode)
    finally:
        model.model.generation_config = kept
    if folder.is_dir():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def find_end_ids(model, tokenizer) -> tuple[int, ...]:
    """The ids that end a response: of the tokenizer, the generation settings and the chat template,
    in order."""
    found: list[int | None] = [tokenizer.eos_token_id]
    from_settings = model.generation_config.eos_token_id if model.generation_config else None
    found += from_settings if isinstance(from_settings, list) else [from_settings]
    if tokenizer.chat_template:
        try:
            found.append(ChatTemplate(tokenizer).end_id)
        except TemplateError as error:
            raise ModelError(
                f"the chat template of {tokenizer.name_or_path!r} {error}; use another model"
            ) from None
    return tuple(dict.fromkeys(int(i) for i in found if i is not None))


def fingerprint(model: LanguageModel) -> str:
    """A hash of the weights: the same for the same values, wherever they are stored."""
    named = model.model.named_parameters()
    if model.digest is None:
        return weights_fingerprint(named)
    beside = [(name, weight) for name, weight in named if adapters.is_of_adapter(name)]
    return model.digest + (weights_fingerprint(beside) if beside else "")
