"""On-policy distillation as a flat loop: prompts -> rollouts -> batches -> fused_loss -> step.

python examples/own_loop.py --steps 60

This is the loop of `potstill train` without what makes that one safe and quick to use: no recipe,
checkpoints, logs or ranks. Change what you like; each part is also imported by itself.
"""

import argparse
from pathlib import Path

import torch

import potstill

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--rollouts", type=int, default=48, help="prompts a step, one completion each")
parser.add_argument("--problems", type=int, default=60, help="held-out problems of the evaluation")
parser.add_argument("--out", type=Path, default=Path("runs/own-loop"))
arguments = parser.parse_args()

# The pair. What ends a text of either model ends a rollout; the ends are one class in the loss.
student, teacher = potstill.load_model("potstill:base"), potstill.load_model("potstill:teacher")
teacher.requires_grad_(False)
end_ids = potstill.end_set(student, teacher)

# The prompts, as token ids that leave room for a completion.
window = 128
examples = potstill.load_examples("multiplication", num_examples=4096)
prompts = potstill.make_prompts(
    examples, student.tokenizer, template="raw", max_completion=window, context_length=512
)

# Who writes: the student as it is now. "teacher" gives SFT or offline RL, "mixed" all between.
native = potstill.NativeEngine
writing = potstill.Writing(
    objective=potstill.Objective(prefix="student"),
    engines={"student": native(student.model), "teacher": native(teacher.model)},
    window=window,
    end_ids=end_ids,
    sampling=potstill.Sampling(),
    rollouts_per_step=arguments.rollouts,
)
# The loss at each written token: 0.2 KL(teacher || student) + 0.8 KL(student || teacher).
terms = potstill.LossTerms(forward=0.2, reverse=0.8)
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)

for step in range(arguments.steps):
    # The seed of each completion names its place, so that a run can be repeated.
    first = step * arguments.rollouts
    chosen = [prompts[(first + i) % len(prompts)] for i in range(arguments.rollouts)]
    seeds = [(0, step, i) for i in range(arguments.rollouts)]
    rollouts = potstill.write_rollouts(writing, chosen, seeds=seeds)

    # One divisor for the whole step, however many batches it is cut into.
    num_tokens = sum(sum(rollout.trained) for rollout in rollouts)
    forward_kl = reverse_kl = 0.0
    for batch in potstill.make_batches(rollouts, tokens_per_batch=2048):
        hidden_ND = student(batch.input_ids_BT)[batch.loss_mask_BT]
        teacher_hidden_NE = teacher(batch.teacher_ids_BT)[batch.teacher_mask_BT]
        loss, _, stats = potstill.fused_loss(
            hidden_ND,
            student.head,
            teacher_hidden_NE,
            teacher.head,
            terms,
            scale=1 / num_tokens,
            end_ids=end_ids,
        )
        loss.backward()
        forward_kl += stats.forward_kl_N.sum().item() / num_tokens
        reverse_kl += stats.reverse_kl_N.sum().item() / num_tokens

    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    warmup.step()
    print(
        f"step {step + 1}: forward KL {forward_kl:.3f}, reverse KL {reverse_kl:.3f}, "
        f"{num_tokens} tokens"
    )

settings = potstill.Evaluation(
    source="multiplication", num_problems=arguments.problems, temperatures=(1.0,)
)
models = {"before": potstill.load_model("potstill:base"), "after": student, "teacher": teacher}
for name, model in models.items():
    (row,) = potstill.evaluate(model, settings, quiet=True)
    print(f"{name}: Avg@{settings.num_responses} {100 * row['avg'][0]:.1f} %")
potstill.save_model(student, student.model.state_dict(), end_ids, arguments.out)
print(f"the student is in {arguments.out}")
