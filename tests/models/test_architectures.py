"""Every kind of causal LM in the installed transformers works, or is refused in one line."""

import copy
import math
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from odd_models import SIZES, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import potstill
from potstill.config import Sampling
from potstill.models.language_model import LanguageModel, ModelError
from potstill.models.probe import ready
from potstill.models.sampling import sample
from potstill.runs import run_folder

# Names of sizes in configurations; each is given those that it knows.
GENERIC: dict[str, Any] = SIZES | {
    "attention_chunk_size": 8,
    "attn_layer_indices": [1],
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "d_ff": 48,
    "d_model": 32,
    "dff": 48,
    "expand_ratio": 2,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "first_k_dense_replace": 1,
    "full_attention_interval": 2,
    "full_attn_idxs": [1],
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "intermediate_size_mlp": 48,
    "kv_lora_rank": 16,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "moe_intermediate_size": 16,
    "moe_num_experts": 4,
    "n_ctx": 512,
    "n_embd": 32,
    "n_group": 1,
    "n_groups": 1,
    "n_head": 4,
    "n_heads": 4,
    "n_inner": 48,
    "n_layer": 2,
    "n_layers": 2,
    "n_positions": 512,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_heads": 4,
    "num_layers": 2,
    "num_local_experts": 4,
    "q_lora_rank": 16,
    "rotary_dim": 8,
    "qk_head_dim": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "sliding_window": 8,
    "state_size": 8,
    "topk_group": 1,
    "v_head_dim": 8,
    "vocab_size_per_layer_input": 314,
    "word_embed_proj_dim": 32,
}
# Settings that cannot be told from names alone.
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
# The default suite has these: plain attention, routers, a mixed cache, scaled logits, other names
# for everything.
FEW = (
    "gpt2",
    "opt",
    "gemma3_text",
    "qwen3_moe",
    "deepseek_v3",
    "jamba",
    "falcon_h1",
    "bloom",
    "llama4_text",
)


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer()


def build(kind: str, tok, seed: int):
    """A tiny random model; raises whatever an architecture raises of sizes that do not fit it."""
    default = AutoConfig.for_model(kind)
    if default.is_encoder_decoder or any(
        hasattr(default, f"{part}_config") for part in ("vision", "text", "audio")
    ):
        raise ValueError("no language model alone")
    known = default.to_dict().keys() | default.attribute_map.keys()
    ids = {name: getattr(tok, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {name: value for name, value in GENERIC.items() if name in known}
    if "is_decoder" in known:
        fields["is_decoder"] = True
    if "qk_rope_head_dim" in known:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
        fields.pop("head_dim", None)
    # Two layers of two kinds, where there are two.
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if len(kinds) > 1 and "layer_types" in default.to_dict():
        fields["layer_types"] = sorted(kinds, key=lambda layer: layer == "full_attention")[-2:]
    fields |= SPECIAL.get(kind, {})
    config = AutoConfig.for_model(kind, vocab_size=len(tok), **ids, **fields)
    with torch.device("meta"):
        num_weights = sum(
            weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters()
        )
    if num_weights > 8_000_000:
        raise ValueError(f"its sizes have other names: {num_weights:,} weights")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def decoding_error(model: LanguageModel) -> float:
    """The largest difference of log-probabilities at drawing from those of one forward pass over
    each row alone."""
    prompts = [tuple(range(3, 3 + length)) for length in (9, 4, 12)]
    written = sample(
        model.model,
        prompts,
        [(i, 1) for i in range(3)],
        max_tokens=(12, 3, 9),
        end_ids=(2,),
        sampling=Sampling(),
    )
    error = 0.0
    with torch.no_grad():
        for prompt, each in zip(prompts, written, strict=True):
            logits = model.head(
                model(torch.tensor([prompt + each.token_ids]))[0, len(prompt) - 1 : -1]
            )
            log_probs = logits.log_softmax(-1).gather(1, torch.tensor(each.token_ids)[:, None])[
                :, 0
            ]
            error = max(error, (log_probs - torch.tensor(each.log_probs)).abs().max().item())
    return error


def check(kind: str, tok, tmp_path) -> str:
    """Try an architecture: "pass" or why it is refused. Fails for anything else."""
    try:
        model = build(kind, tok, seed=0)
    except Exception as error:
        return f"not built: {' '.join(str(error).split())[:80]}"
    try:
        student = ready(model, tok)
    except ModelError as error:
        assert "\n" not in str(error) and type(model).__name__ in str(error)
        return f"refused: {error}"
    # Chunks of a scan round more than anything else.
    assert decoding_error(student) < 2e-3
    assert student.flops.per_token > 0
    recipe = tiny_recipe(
        tmp_path / kind,
        objective={"prefix": "student", "kl": "reverse"},
        window={"tokens": 8},
        train={"steps": 2, "prompts_per_step": 3, "lr": 1e-3, "warmup_steps": 0},
    )
    teacher = ready(build(kind, tok, seed=1), tok)
    before = copy.deepcopy(model.state_dict())
    result = potstill.train(
        recipe, student=student, teacher=teacher, prompts=["The", "loss is", "one"], quiet=True
    )
    rows = run_folder.read_rows(result.folder / "metrics.jsonl")
    assert len(rows) == 2 and all(
        math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows
    )
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return "pass"


@pytest.mark.parametrize("kind", FEW)
def test_a_few_architectures_decode_as_they_train(tok, tmp_path, kind):
    assert check(kind, tok, tmp_path) == "pass"


@pytest.mark.slow
def test_every_architecture_works_or_is_refused_in_one_line(tok, tmp_path, capsys):
    found: dict[str, str] = {}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            found[kind] = check(kind, tok, tmp_path)
        except Exception as error:
            found[kind] = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    outcomes = ("pass", "refused", "not built", "FAILED")
    groups = {
        how: [kind for kind, what in found.items() if what.startswith(how)] for how in outcomes
    }
    with capsys.disabled():
        for how, kinds in groups.items():
            print(f"\n{how}: {len(kinds)}: {' '.join(kinds)}")
        for kind, what in found.items():
            if what != "pass":
                print(f"  {kind}: {what}")
    assert not groups["FAILED"]
    assert len(groups["pass"]) >= 100
