"""The gradient of a tied embedding that is added late, against autograd's own."""

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from potstill.models.lean.embedding import embedding_added_late


def model_of(*, tied: bool = True, pad: int | None = 3) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        pad_token_id=pad,
    )
    return Qwen3ForCausalLM(config)


def gradients(model, batches) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for ids in batches:
        model(ids).logits.logsumexp(-1).square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pad", [3, None])
def test_gradients_are_those_of_autograd(tied, pad):
    model = model_of(tied=tied, pad=pad)
    # Ids that come again, in a row and in another batch, and the padding.
    batches = [torch.tensor([[5, 5, 3, 7], [7, 3, 3, 9]]), torch.tensor([[5, 1, 2, 5]])]
    expected = gradients(model, batches)
    with embedding_added_late(model):
        # The last batch's part is still to come.
        gradients(model, batches)
        assert ("forward" in vars(model.get_input_embeddings())) == tied
    found = {name: weight.grad for name, weight in model.named_parameters()}
    assert "forward" not in vars(model.get_input_embeddings())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


def test_an_embedding_that_is_more_than_a_look_up_is_left_alone():
    class Scaled(nn.Embedding):
        def forward(self, input):
            return 3 * super().forward(input)

    model = model_of()
    scaled = Scaled(50, 32)
    scaled.weight = model.lm_head.weight
    model.set_input_embeddings(scaled)
    with embedding_added_late(model):
        assert "forward" not in vars(scaled)
