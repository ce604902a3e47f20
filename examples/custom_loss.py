"""A loss of your own at each token, from the exact statistics of both models, without any [N,
vocabulary] tensor.

python examples/custom_loss.py

`fused_statistics` gives every statistic of a token with its gradient. What you make of them, a new
divergence or weights, is a few lines of PyTorch. The same loss on whole logits (`token_divergence`)
shows that it is the same.
"""

import torch

from potstill import (
    LossTerms,
    NativeEngine,
    Objective,
    Sampling,
    Writing,
    end_set,
    fused_loss,
    fused_statistics,
    load_examples,
    load_model,
    make_batches,
    make_prompts,
    token_divergence,
    write_rollouts,
)


def capped(forward_kl_N, reverse_kl_N, teacher_entropy_N):
    """Forward KL where the teacher is unsure, else reverse KL, and no token counts for more than
    two nats."""
    is_unsure_N = teacher_entropy_N > 0.3
    return torch.where(is_unsure_N, forward_kl_N, reverse_kl_N).clamp(max=2.0)


student, teacher = load_model("potstill:base"), load_model("potstill:teacher")
teacher.requires_grad_(False)
end_ids = end_set(student, teacher)
examples = load_examples("multiplication", num_examples=16)
prompts = make_prompts(
    examples, student.tokenizer, template="raw", max_completion=64, context_length=512
)
writing = Writing(
    objective=Objective(prefix="student"),
    engines={"student": NativeEngine(student.model)},
    window=64,
    end_ids=end_ids,
    sampling=Sampling(),
    rollouts_per_step=len(prompts),
)
rollouts = write_rollouts(writing, prompts, seeds=[(0, 0, i) for i in range(len(prompts))])
(batch,) = make_batches(rollouts, tokens_per_batch=10**6)

# The hidden states [N, D] and [N, E] of the N written tokens; the heads turn them into logits, tile
# by tile.
hidden_ND = student(batch.input_ids_BT)[batch.loss_mask_BT]
teacher_hidden_NE = teacher(batch.teacher_ids_BT)[batch.teacher_mask_BT]
sides = (hidden_ND, student.head, teacher_hidden_NE, teacher.head)

# A divergence of your own: any function of the statistics.
stats = fused_statistics(*sides, end_ids=end_ids)
loss = capped(stats.forward_kl_N, stats.reverse_kl_N, stats.teacher_entropy_N).mean()
(gradient_ND,) = torch.autograd.grad(loss, hidden_ND, retain_graph=True)
print(f"capped divergence of {len(hidden_ND)} tokens: {loss.item():.4f} nats")

# The same from whole logits.
logits_NV, teacher_logits_NV = student.head(hidden_ND), teacher.head(teacher_hidden_NE)
forward_N, plain = token_divergence(logits_NV, teacher_logits_NV, "forward", end_ids=end_ids)
reverse_N, _ = token_divergence(logits_NV, teacher_logits_NV, "reverse", end_ids=end_ids)
whole = capped(forward_N, reverse_N, plain.teacher_entropy_N).mean()
(whole_ND,) = torch.autograd.grad(whole, hidden_ND, retain_graph=True)
error = (gradient_ND - whole_ND).abs().max() / whole_ND.abs().max()
print(f"from whole logits: {whole.item():.4f} nats, gradients differ by {error:.0e} of the largest")

# A weight of your own for each token, which is a constant: here, how unlikely the teacher finds
# what was written.
labels_N = batch.target_ids_BT[batch.loss_mask_BT]
with torch.no_grad():
    known = fused_statistics(*sides, labels_N=labels_N, end_ids=end_ids)
weights_N = 1 - known.teacher_log_prob_N.exp()
loss, _, _ = fused_loss(
    *sides, LossTerms(reverse=1.0), weights_N=weights_N, scale=1 / len(labels_N), end_ids=end_ids
)
loss.backward()
print(f"reverse KL weighted by surprise: {loss.item():.4f} nats a token")
