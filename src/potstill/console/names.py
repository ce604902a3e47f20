"""The nearest name to one that does not exist: of a field, by its spelling or by what other
programs call it."""

import difflib
from collections.abc import Sequence

# Names of fields in other programs; where several fields are given, the first that the
# recipe or the options of an evaluation have is meant.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "learning_rate": ("train.lr",),
    "lr_scheduler_type": ("train.schedule",),
    "lr_schedule": ("train.schedule",),
    "warmup_ratio": ("train.warmup_steps",),
    "warmup": ("train.warmup_steps",),
    "max_steps": ("train.steps",),
    "num_steps": ("train.steps",),
    "epochs": ("train.steps",),
    "num_epochs": ("train.steps",),
    "num_train_epochs": ("train.steps",),
    "batch_size": ("train.prompts_per_step",),
    "train_batch_size": ("train.prompts_per_step",),
    "per_device_train_batch_size": ("train.tokens_per_batch",),
    "micro_batch_size": ("train.tokens_per_batch",),
    "gradient_accumulation": ("train.tokens_per_batch",),
    "gradient_accumulation_steps": ("train.tokens_per_batch",),
    "num_generations": ("reward.group_size",),
    "reward_funcs": ("reward.source",),
    "scale_rewards": ("reward.advantage",),
    "epsilon": ("reward.clip",),
    "num_iterations": ("rollouts.reuse",),
    # Fields that take less memory, where others compute activations again.
    "gradient_checkpointing": ("train.tokens_per_batch",),
    "gradient_checkpointing_enable": ("train.tokens_per_batch",),
    "grad_clip": ("train.max_grad_norm",),
    "gradient_clip": ("train.max_grad_norm",),
    "clip_grad_norm": ("train.max_grad_norm",),
    "adam_beta1": ("train.betas",),
    "adam_beta2": ("train.betas",),
    "adam_betas": ("train.betas",),
    "wd": ("train.weight_decay",),
    "bf16": ("train.compute_dtype",),
    "fp16": ("train.compute_dtype",),
    "precision": ("train.compute_dtype",),
    "torch_dtype": ("student.dtype",),
    "eval_steps": ("validation.every",),
    "eval_strategy": ("validation.every",),
    "eval_dataset": ("validation.source",),
    "validation_file": ("validation.source",),
    "early_stopping_patience": ("validation.patience",),
    "load_best_model_at_end": ("validation.keep_best",),
    "save_total_limit": ("train.keep_checkpoints",),
    "system_prompt": ("data.system",),
    "enable_thinking": ("data.template_arguments",),
    "save_steps": ("train.checkpoint_every",),
    "save_every": ("train.checkpoint_every",),
    # Names that recipes had before.
    "mixing": ("weight_schedule",),
    "mix_unit": ("objective.prefix_mix",),
    "seed": ("train.seed",),
    "beta": ("objective.forward_weight", "reward.start_kl"),
    "alpha": ("objective.forward_weight",),
    "lora_r": ("student.lora.rank",),
    "lora_rank": ("student.lora.rank",),
    "lora_alpha": ("student.lora.alpha",),
    "lora_dropout": ("student.lora.dropout",),
    "lora_target_modules": ("student.lora.targets",),
    "target_modules": ("student.lora.targets",),
    "lambda": ("objective.student_share",),
    "lmbda": ("objective.student_share",),
    "kl_coef": ("objective.forward_weight", "reward.start_kl"),
    "divergence": ("objective.kl",),
    "loss": ("objective.kl",),
    "kl_type": ("objective.kl",),
    "max_length": ("window.tokens", "evaluation.max_tokens"),
    "max_seq_length": ("window.tokens",),
    "max_new_tokens": ("window.tokens", "evaluation.max_tokens"),
    "max_completion_length": ("window.tokens", "evaluation.max_tokens"),
    "max_tokens": ("window.tokens", "evaluation.max_tokens"),
    "student": ("student.model",),
    "teacher": ("teacher.model",),
    "model": ("student.model",),
    "model_name": ("student.model",),
    "model_name_or_path": ("student.model",),
    "student_model": ("student.model",),
    "teacher_model": ("teacher.model",),
    "teacher_model_name_or_path": ("teacher.model",),
    "dataset": ("data.source", "evaluation.source"),
    "dataset_name": ("data.source",),
    "dataset_path": ("data.source",),
    "data_path": ("data.source",),
    "prompts": ("data.source",),
    "max_samples": ("data.num_prompts",),
    "num_samples": ("data.num_prompts",),
    "chat_template": ("data.template",),
    "output_dir": ("out",),
    "output": ("out",),
    "run_dir": ("out",),
    "top_p": ("sampling.top_p",),
    "temperature": ("sampling.temperature", "evaluation.temperatures"),
}


def nearest_field(name: str, fields: Sequence[str]) -> str:
    """The field that a dotted name most likely means: a slip of the pen, a synonym, or else the
    nearest spelling."""
    section, _, last = name.replace("-", "_").lower().rpartition(".")
    siblings = {
        field.rpartition(".")[2]: field for field in fields if field.rpartition(".")[0] == section
    }
    sections = (
        [] if section else sorted({field.partition(".")[0] for field in fields if "." in field})
    )
    meant = [field for field in SYNONYMS.get(last, ()) if field in fields or field in sections]
    meant.sort(key=lambda field: field not in siblings.values())
    same = [field for field in fields if field.rpartition(".")[2] == last]
    return (
        siblings.get(nearest(last, list(siblings), 0.8) or "")
        or next(iter([*meant, *same]), None)
        or nearest(last, sections, 0.7)
        or siblings.get(nearest(last, list(siblings), 0.4) or "")
        or nearest(name, fields)
        or fields[0]
    )


def nearest(name: str, names: Sequence[str], cutoff: float = 0.0) -> str | None:
    """The name that is spelt most like this one; None where none is as like as `cutoff`."""
    found = difflib.get_close_matches(name, names, 1, cutoff=cutoff)
    return found[0] if found else None
