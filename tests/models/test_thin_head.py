"""The head's product of a few rows, against float64 and against a batch of one."""

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from potstill.config import Sampling
from potstill.models.lean.head import FEW_ROWS, MANY_TOKENS, thin_head
from potstill.models.sampling import sample


class Owner:
    """A model by its head alone."""

    def __init__(self, head: nn.Module):
        self.head = head

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 2), (8, 1), (9, 1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_logits_are_right_and_the_head_is_as_it_was(shape, has_bias):
    torch.manual_seed(0)
    head = nn.Linear(32, MANY_TOKENS, bias=has_bias)
    hidden = torch.randn(*shape, 32)
    with torch.inference_mode(), thin_head(Owner(head)):
        logits = head(hidden)
    exact = nn.functional.linear(
        hidden.double(), head.weight.double(), head.bias.double() if has_bias else None
    )
    assert logits.shape == exact.shape
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(head)


def test_a_head_that_is_more_than_a_layer_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    head, hidden = Scaled(8, MANY_TOKENS), torch.randn(2, 8)
    with thin_head(Owner(head)):
        assert "forward" not in vars(head)
        torch.testing.assert_close(
            head(hidden), 2 * nn.functional.linear(hidden, head.weight, head.bias)
        )


def test_a_large_vocabulary_is_drawn_from_alike_in_a_batch_and_alone():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=MANY_TOKENS + 5,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    model, num_rows = Qwen3ForCausalLM(config).eval(), max(FEW_ROWS)
    prompts, seeds = [(1, 2, 3)] * num_rows, [(7, i) for i in range(num_rows)]
    settings = {"max_tokens": 12, "end_ids": (), "sampling": Sampling()}
    together = sample(model, prompts, seeds, **settings)
    for i in range(num_rows):
        (alone,) = sample(model, [prompts[i]], [seeds[i]], **settings)
        assert alone.token_ids == together[i].token_ids
        assert alone.log_probs == pytest.approx(together[i].log_probs, abs=1e-4)
        assert alone.entropies == pytest.approx(together[i].entropies, abs=1e-4)
