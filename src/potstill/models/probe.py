"""The check of a model before it is used: a few tokens through everything that potstill does with
it.

Hidden states times head must be the model's own logits, and what is decoded with a cache, in a
batch of left-padded rows that leave it one by one, must have the log-probabilities of the
training's right-padded forward pass. Whatever an architecture cannot do becomes one line, for
folders and for objects alike.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from potstill.config import Sampling
from potstill.models.language_model import LanguageModel, load_model
from potstill.models.lean.quantized import is_quantized, plain_tensors
from potstill.models.sampling import sample
from potstill.models.weights import refuse_non_finite
from potstill.seeds import Stream, stream_key
from potstill.types import ModelError, NonFiniteError

# Lengths of the prompts that are decoded together, and how many tokens each gets: one row leaves
# early. Those of a model that looks back through a window are longer, so that its cache forgets,
# where that is quick.
LENGTHS, CAPS = (5, 3, 5), (1, 3, 3)
LONGEST_WINDOW = 128
# Errors relative to logits that rounding may cause in them, and in log-probabilities of another
# order of computation.
EXACT, DECODED = 1e-4, 1e-3
# The same where weights have 8 bits, as in bfloat16, to which a model rounds its own logits too.
ROUNDED, ROUNDED_DECODED = 2e-2, 5e-2


def ready(given, tokenizer=None, device: torch.device | None = None, **options) -> LanguageModel:
    """A model to work with, probed once: by its name, a Hugging Face object, or loaded before.

    It is moved to `device` if one is given. `options` are those of `load_model` for a name,
    `tokenizer` is that of an object. Raises ModelError.
    """
    if isinstance(given, str | Path):
        given = load_model(str(given), **options)
    elif options.get("attention") is not None:
        raise ModelError(
            f"attention is {options['attention']!r} for a model that is given as an object, which "
            "has its own; call its set_attn_implementation, and leave the field out"
        )
    elif not isinstance(given, LanguageModel):
        given = _wrap(given, tokenizer)
    if device is not None:
        given.to(device)
    probe(given)
    return given


def _wrap(given, tokenizer) -> LanguageModel:
    name = type(given).__name__
    if hasattr(given, "peft_config"):
        raise ModelError(
            f"model {name!r} has an adapter of peft already; give what its merge_and_unload() "
            "returns, and set student.lora to train an adapter"
        )
    if not isinstance(given, nn.Module) or not hasattr(given, "get_output_embeddings"):
        raise ModelError(
            f"{name!r} is no model; give the name of a folder or a causal LM of transformers"
        )
    if tokenizer is None:
        raise ModelError(
            f"model {name!r} is given as an object without its tokenizer; give tokenizer="
        )
    return LanguageModel(given, tokenizer, name)


def probe(model: LanguageModel) -> None:
    """Raise ModelError unless the model can do what is asked of it here. A model is probed once."""
    if model.is_probed:
        return
    _refuse_rows(model)
    refuse_non_finite(model.name, plain_tensors(model.model))
    with _evaluating(model), torch.no_grad():
        check_logits(model)
        _refuse_without_cache(model)
        _check_decoding(model)
    model.is_probed = True


@contextlib.contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _able(model: LanguageModel, to: str) -> Iterator[None]:
    """Turn what an architecture's own code raises into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ModelError):
            raise
        if isinstance(error, NonFiniteError):
            raise ModelError(f"model {model.name!r}: {error}") from None
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model {model.name!r} ({type(model.model).__name__}) cannot {to} "
            f"({type(error).__name__}: {reason}); potstill does not support this architecture"
        ) from None


def _refuse_rows(model: LanguageModel) -> None:
    with _able(model, "be taken apart into a backbone and a head"):
        num_rows = model.vocab_size
    weight = model.model.get_output_embeddings().weight
    if not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__"):
        raise ModelError(
            f"model {model.name!r}: its head is quantised ({type(weight).__name__}), and the loss "
            "takes its own numbers; quantise the model without lm_head"
        )
    if beyond := [i for i in model.end_ids if not 0 <= i < num_rows]:
        raise ModelError(
            f"model {model.name!r}: end id {beyond[0]} has no row in its head of {num_rows}; "
            "mend eos_token_id in its generation_config.json or its tokenizer"
        )


def check_logits(model: LanguageModel) -> None:
    """Raise ModelError unless hidden states and head give the model's own logits, so no scaling is
    missed."""
    with _able(model, "be taken apart into a backbone and a head"):
        error, allowed = logits_error(model)
    if not error <= allowed:
        raise ModelError(
            f"model {model.name!r}: its logits differ from hidden states times head by "
            f"{error:.3g} (allowed {allowed:.3g}); {type(model.model).__name__} changes its "
            "logits in a way that potstill does not know"
        )


def logits_error(model: LanguageModel) -> tuple[float, float]:
    """The largest difference of the model's own logits from hidden states times head, and what
    rounding may make it.

    Raises ModelError for logits that are not finite.
    """
    ids_BT = _ids(model, 8)[None]
    with torch.no_grad():
        theirs = model.decoder(input_ids=ids_BT, use_cache=False).logits.float()
        ours = model.head(model(ids_BT)[0])[None]
    if not torch.isfinite(theirs).all():
        raise ModelError(f"model {model.name!r}: its logits are not finite, though its weights are")
    return (theirs - ours).abs().max().item(), _allowed(model, theirs, EXACT, ROUNDED)


def _ids(model: LanguageModel, num: int) -> Tensor:
    """Ids from all over the vocabulary."""
    return (
        torch.arange(num, device=model.device) * max(model.vocab_size // num, 1) % model.vocab_size
    )


def _allowed(model: LanguageModel, logits: Tensor, exact: float, rounded: float) -> float:
    is_exact = model.head.weight_VD.dtype == torch.float32 and not is_quantized(model.model)
    share = exact if is_exact else rounded
    return share * logits.abs().max().clamp(min=1).item()


def _refuse_without_cache(model: LanguageModel) -> None:
    with _able(model, "be run with a cache"):
        output = model.model(input_ids=_ids(model, 2)[None], use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if not hasattr(cache, "layers") or not hasattr(cache, "reorder_cache"):
        raise ModelError(
            f"model {model.name!r} ({type(model.model).__name__}) keeps no cache of keys and "
            "values, as state-space models like Mamba do not; potstill cannot decode it"
        )


def _check_decoding(model: LanguageModel) -> None:
    """Compare log-probabilities at drawing with those of forward passes: of all rows together, and
    of each alone."""
    window = getattr(model.model.config.get_text_config(), "sliding_window", None)
    more = window if isinstance(window, int) and window <= LONGEST_WINDOW else 0
    ids = _ids(model, max(LENGTHS) + more + len(LENGTHS)).tolist()
    prompts = [tuple(ids[i : i + length + more]) for i, length in enumerate(LENGTHS)]
    seeds = [stream_key((0, 0, i), Stream.MODEL_CHECK) for i in range(len(prompts))]
    with _able(model, "decode a batch of rows of different lengths, some of which end early"):
        written = sample(
            model.model, prompts, seeds, max_tokens=CAPS, end_ids=(), sampling=Sampling()
        )
    rows = [prompt + each.token_ids for prompt, each in zip(prompts, written, strict=True)]
    longest = max(map(len, rows))
    ids_BT = torch.tensor([row + (0,) * (longest - len(row)) for row in rows], device=model.device)
    hidden_BTD = model(ids_BT)
    allowed, errors = 0.0, {"right-padded": 0.0, "alone": 0.0}
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        places = slice(len(prompt) - 1, len(row) - 1)
        drawn_L = torch.tensor(written[i].log_probs)
        of_row = {"right-padded": hidden_BTD[i], "alone": model(ids_BT[i : i + 1, : len(row)])[0]}
        for how, hidden_TD in of_row.items():
            logits_LV = model.head(hidden_TD[places])
            log_probs_L = logits_LV.log_softmax(-1).cpu()[
                range(len(drawn_L)), list(written[i].token_ids)
            ]
            errors[how] = max(errors[how], (log_probs_L - drawn_L).abs().max().item())
            allowed = max(allowed, _allowed(model, logits_LV, DECODED, ROUNDED_DECODED))
    if not max(errors.values()) <= allowed:
        raise ModelError(
            f"model {model.name!r} ({type(model.model).__name__}): tokens decoded with its cache "
            f"have other log-probabilities than in one forward pass, by {errors['alone']:.3g} "
            f"nats of a row alone and {errors['right-padded']:.3g} of one padded on the right "
            f"(allowed {allowed:.3g}); potstill does not support this architecture"
        )
