"""Whether a student has anything to learn from its scores: entropy to explore with, and groups of
responses that disagree."""

from collections.abc import Callable, Sequence
from typing import TypedDict

from potstill.config import Recipe
from potstill.evaluation.quality import Scorer
from potstill.models.language_model import LanguageModel
from potstill.models.sampling import sample
from potstill.objectives.reward import reward_sums, with_credit
from potstill.rollouts.prefixes import written_rollout
from potstill.rollouts.text import num_tokens_to_answer, responses
from potstill.seeds import Stream, stream_key
from potstill.types import Prompt

# Prompts that are tried.
NUM_PROMPTS = 32
# Below these there is little to explore with: entropy in nats a token, share of groups that
# disagree.
COLLAPSED_ENTROPY, FEW_GROUPS = 0.05, 0.1


class Start(TypedDict):
    """Scores and entropy of a student before its first step.

    `entropy_before_answer` is in nats a token, `score` the mean, `groups_with_signal` the share of
    groups whose responses do not all have one score, `truncation` that by the first window.
    """

    entropy_before_answer: float
    score: float
    groups_with_signal: float
    truncation: float
    num_groups: int
    group_size: int


def measure_start(
    recipe: Recipe,
    student: LanguageModel,
    prompts: Sequence[Prompt],
    grader: Scorer,
    *,
    max_tokens: int,
    end_ids: tuple[int, ...],
    answer_end: Callable[[str], int | None],
) -> Start:
    """Let the student write a group of responses of at most `max_tokens` to each of some prompts,
    and score them."""
    size = recipe.reward.group_size
    chosen = [prompt for prompt in prompts[:NUM_PROMPTS] for _ in range(size)]
    keys = [(recipe.train.seed, 0, number) for number in range(len(chosen))]
    completions = sample(
        student.decoder,
        [prompt.token_ids for prompt in chosen],
        [stream_key(key, Stream.START) for key in keys],
        max_tokens=max_tokens,
        end_ids=end_ids,
        sampling=recipe.sampling,
    )
    rollouts = [
        written_rollout(prompt, each.token_ids, ("student",) * len(each.token_ids), each.stop)
        for prompt, each in zip(chosen, completions, strict=True)
    ]
    texts = responses(rollouts, student.tokenizer)
    sums = reward_sums(with_credit(rollouts, texts, grader, recipe.reward))
    entropy, num_tokens = 0.0, 0
    for completion, text in zip(completions, texts, strict=True):
        end = num_tokens_to_answer(completion.token_ids, text, student.tokenizer, answer_end)
        entropy += sum(completion.entropies[:end])
        num_tokens += end
    num = len(rollouts)
    return {
        "entropy_before_answer": entropy / num_tokens,
        "score": sums["reward"] / num,
        "groups_with_signal": sums["groups_with_signal"] / num,
        "truncation": sum(each.stop == "length" for each in completions) / num,
        "num_groups": num // size,
        "group_size": size,
    }


def verdict(start: Start) -> list[str]:
    """The numbers of `measure_start` in plain words, and a warning where there is little to learn
    from."""
    entropy, share = start["entropy_before_answer"], start["groups_with_signal"]
    found = (
        f"start: entropy before the answer {entropy:.3f} nats, mean score {start['score']:.1%}, "
        f"cut by the window {start['truncation']:.0%}; responses differ in score in {share:.0%} "
        f"of {start['num_groups']} groups of {start['group_size']}, and only these give the reward "
        "a gradient"
    )
    warned = []
    if share < FEW_GROUPS:
        too = "hard" if start["score"] < 0.5 else "easy"
        warned.append(
            "warning: almost no group disagrees, so the reward has almost no gradient: the prompts "
            f"are too {too} for this student; take other prompts, a larger reward.group_size or "
            "another start"
        )
    if entropy < COLLAPSED_ENTROPY:
        warned.append(
            f"warning: the entropy is near 0 (below {COLLAPSED_ENTROPY:g} nats), so that responses "
            "hardly differ; start from a student that kept its entropy (forward KL keeps it), or "
            "raise sampling.temperature and objective.temperature"
        )
    return [found + ("" if warned else ": there is entropy to explore with"), *warned]
