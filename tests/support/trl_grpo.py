"""TRL's GRPOTrainer around responses that are there already, whose loss is looked at."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.models.language_model import LanguageModel
from potstill.types import Rollout


def grpo_trainer(
    student: LanguageModel,
    rollouts: Sequence[Rollout],
    scores: Sequence[float],
    scratch: str,
    **settings: Any,
):
    """TRL's trainer, which is given these responses and their scores; `settings` are of its
    GRPOConfig."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    logging.getLogger("trl").setLevel(logging.ERROR)

    def written(prompts: list[str], trainer) -> dict[str, Any]:
        return {
            "prompt_ids": [list(rollout.prompt.token_ids) for rollout in rollouts],
            "completion_ids": [list(rollout.completion_ids) for rollout in rollouts],
            "logprobs": None,
        }

    def score(**columns: Any) -> list[float | None]:
        return [*scores]

    config = GRPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=len(rollouts),
        beta=0.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        **settings,
    )
    return GRPOTrainer(
        model=student.model,
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["prompt"]}),
        processing_class=student.tokenizer,
        rollout_func=written,
    )


def trl_inputs(trainer) -> dict[str, Any]:
    """All that TRL makes of the responses for its loss: padded ids, masks, and advantages."""
    trainer.model.train()
    num = trainer.args.per_device_train_batch_size
    return trainer._generate_and_score_completions([{"prompt": "prompt"}] * num)


def trl_loss(trainer, inputs: dict[str, Any]) -> Tensor:
    """TRL's loss of one step, in which nothing is accumulated."""
    trainer.current_gradient_accumulation_steps = 1
    return trainer._compute_loss(trainer.model, inputs)


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Numbers of each response's tokens as TRL lays them out [B, T]."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
