import torch
from conftest import make_rollout

from potstill.rollouts.batching import make_batch, make_batches


def test_alignment_by_hand():
    # Prompt 1 7 8, completion 9 5 2 (its stop token): position t predicts token t+1.
    batch = make_batch([make_rollout([1, 7, 8], [9, 5, 2]), make_rollout([1], [6, 2])])
    assert batch.input_ids_BT.tolist() == [[1, 7, 8, 9, 5], [1, 6, 0, 0, 0]]
    assert batch.target_ids_BT.tolist() == [[7, 8, 9, 5, 2], [6, 2, 0, 0, 0]]
    assert batch.loss_mask_BT.int().tolist() == [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_untrained_tokens_stay_in_the_input_and_out_of_the_loss():
    batch = make_batch([make_rollout([1], [6, 7, 2], trained=[True, False, True])])
    assert batch.input_ids_BT.tolist() == [[1, 6, 7]]
    assert batch.loss_mask_BT.int().tolist() == [[1, 0, 1]]


def test_padding_that_equals_the_end_token_hides_nothing():
    # The padding id is 0, and here 0 also ends a completion: the stop must stay a loss token, and
    # padding is none.
    batch = make_batch([make_rollout([1], [6, 0]), make_rollout([1], [6, 5, 4, 0])])
    assert batch.loss_mask_BT.sum(1).tolist() == [2, 4]
    assert batch.target_ids_BT[batch.loss_mask_BT].tolist() == [6, 0, 6, 5, 4, 0]


def test_batches_hold_every_rollout_once_within_the_budget():
    rollouts = [make_rollout([1, 2], [3] * n, name=str(n)) for n in (5, 1, 9, 2, 2, 30, 7)]
    batches = make_batches(rollouts, tokens_per_batch=20)
    names = [rollout.prompt.example.id for batch in batches for rollout in batch.rollouts]
    assert sorted(names) == sorted(rollout.prompt.example.id for rollout in rollouts)
    for batch in batches:
        assert batch.input_ids_BT.numel() <= 20 or len(batch.rollouts) == 1


def test_at_least_as_many_batches_as_asked():
    rollouts = [make_rollout([1, 2], [3] * n) for n in range(1, 7)]
    for num_batches in range(1, 7):
        batches = make_batches(rollouts, tokens_per_batch=10_000, num_batches=num_batches)
        assert len(batches) == num_batches
        assert sum(len(batch.rollouts) for batch in batches) == 6


def test_masks_count_the_trained_tokens():
    rollouts = [
        make_rollout([1, 2], [3] * n, trained=[i % 2 == 0 for i in range(n)]) for n in range(1, 9)
    ]
    batches = make_batches(rollouts, tokens_per_batch=16)
    assert sum(int(batch.loss_mask_BT.sum()) for batch in batches) == sum(
        sum(r.trained) for r in rollouts
    )
    assert all(batch.input_ids_BT.dtype == torch.long for batch in batches)
