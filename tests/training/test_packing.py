"""Packed batches: the loss and gradients of padded ones, and models that cannot take them."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_rollout, tiny_recipe
from odd_models import make_tiny, make_tokenizer

import potstill
from potstill.config import Objective, Train
from potstill.models.language_model import LanguageModel, ModelError
from potstill.models.lean.activations import layers_run_again
from potstill.models.lean.packing import ROWS_ATTENTION, refuse_unpackable, rows_apart
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.rollouts.batching import batch_places, make_batch
from potstill.runs import run_folder
from potstill.training.step import lean_passes

TOK = make_tokenizer()
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MODELS = {
    "qwen3": {},
    "llama": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "gemma3_text": SLIDING,
}


def model_of(architecture: str, **more) -> LanguageModel:
    model = make_tiny(TOK, architecture, **MODELS[architecture], **more).double()
    return LanguageModel(model, TOK, architecture)


def rollouts_of(lengths) -> list:
    """Rollouts whose teacher is prompted otherwise, some of whose tokens do not count."""
    ids = torch.randint(3, 290, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for i, (prompt, completion) in enumerate(lengths):
        trained = [j % 5 != 3 for j in range(completion)]
        one = make_rollout(ids[i : i + prompt], ids[50 * i : 50 * i + completion], trained)
        asked = dataclasses.replace(one.prompt, teacher_ids=(7, *one.prompt.token_ids, 9)[: i + 2])
        found.append(dataclasses.replace(one, prompt=asked))
    return found


ROLLOUTS = rollouts_of([(3, 12), (1, 1), (6, 4), (2, 9)])


def gradients(student, teacher, loss, *, is_packed: bool, again: bool = False):
    """The loss, and its gradient for every weight of the student."""
    batch = make_batch(ROLLOUTS, is_packed=is_packed)
    student.zero_grad()
    signal = teacher_signal(teacher, batch, loss)
    if again:
        with layers_run_again(student.model):
            value, loss_N, _ = batch_loss(student, teacher, signal, batch, loss)
            value.backward()
    else:
        value, loss_N, _ = batch_loss(student, teacher, signal, batch, loss)
        value.backward()
    return value.item(), loss_N, [weight.grad.clone() for weight in student.parameters()]


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("again", [False, True], ids=["", "again"])
def test_loss_and_gradients_are_those_of_padded_rows(architecture, again):
    student, teacher = model_of(architecture), model_of(architecture, seed=1)
    loss = Loss(objective=Objective(kl="reverse"), normalize="sequence")
    value, loss_N, expected = gradients(student, teacher, loss, is_packed=False)
    with rows_apart(student, teacher):
        its_value, its_loss_N, found = gradients(
            student, teacher, loss, is_packed=True, again=again
        )
    assert its_value == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(its_loss_N, loss_N, rtol=1e-9, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        # Norms compute in float32.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert student.model.config._attn_implementation == "sdpa"


def test_a_packed_batch_has_no_padding_and_a_budget_of_its_own():
    batch = make_batch(ROLLOUTS, is_packed=True)
    lengths = [len(each.prompt.token_ids) + len(each.completion_ids) - 1 for each in ROLLOUTS]
    assert batch.input_ids_BT.shape == (1, sum(lengths))
    places = [i for length in lengths for i in range(length)]
    assert batch.positions_BT is not None and batch.positions_BT.tolist() == [places]
    # Inputs of 14, 12, 9 and 3 tokens, since the teacher's prompts count as well.
    assert batch_places(ROLLOUTS, 26) == [[0], [3, 2], [1]]
    assert batch_places(ROLLOUTS, 26, is_packed=True) == [[0, 3], [2, 1]]


def test_models_that_cannot_are_refused():
    refuse_unpackable(model_of("gemma3_text"), None)
    eager = model_of("qwen3")
    eager.model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match=r"computes attention by 'eager'; set its attention to"):
        refuse_unpackable(eager)
    # Its convolutions look back over the border of two rows.
    mixed = {"layer_types": ["conv", "full_attention"]}
    convolving = LanguageModel(make_tiny(TOK, "lfm2", **mixed), TOK, "lfm2")
    with pytest.raises(ModelError, match=r"'lfm2' .* cannot take rows one after the other: its"):
        refuse_unpackable(convolving)


def test_every_teacher_takes_packed_rows():
    """And not by a mask of all positions by all."""
    student, first, second, start = (model_of("qwen3", seed=seed) for seed in range(4))
    teachings = [SimpleNamespace(teacher=first), SimpleNamespace(teacher=second)]
    setup: Any = SimpleNamespace(student=student, teacher=first, teachings=teachings, start=start)
    with lean_passes(setup, Train(packing=True)):
        found = [each.model.config._attn_implementation for each in (student, first, second, start)]
    assert found == [ROWS_ATTENTION] * 4


def test_a_run_differs_by_rounding(tmp_path):
    rows = []
    for packing in (False, True):
        train = {"packing": packing, "activation_checkpointing": packing}
        recipe = tiny_recipe(tmp_path / str(packing), train=train, reward={"start_kl": 0.1})
        potstill.train(recipe, quiet=True)
        rows.append(run_folder.read_rows(recipe.out / "metrics.jsonl")[0])
    for name in ("loss", "grad_norm", "forward_kl"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4)
