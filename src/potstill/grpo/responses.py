"""Responses of a GRPO step: written, scored, measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from potstill.config import GrpoRecipe
from potstill.models.distributed import World
from potstill.models.flops import ModelFlops, rollout_flops
from potstill.models.language_model import LanguageModel
from potstill.models.sampling import sample
from potstill.rollouts.text import is_loop, num_tokens_to_answer, zlib_ratio
from potstill.runs.schema import ResponseMeans
from potstill.seeds import Key, Stream, stream_key
from potstill.tasks import Task
from potstill.training.controllers import Probe, WindowState
from potstill.types import Completion, Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class GrpoSetup:
    """Everything a run needs, loaded and checked before anything is written."""

    model: LanguageModel
    task: Task
    prompts: list[Prompt]
    probes: list[Prompt]
    end_ids: tuple[int, ...]
    flops: ModelFlops
    world: World
    task_files: dict[str, str]
    date: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Response:
    """A completion with its text, and how many of its tokens come up to the first answer."""

    prompt: Prompt
    completion: Completion
    text: str
    num_before_answer: int

    @property
    def rollout(self) -> Rollout:
        num = len(self.completion.token_ids)
        stop = self.completion.stop
        return Rollout(
            prompt=self.prompt,
            completion_ids=self.completion.token_ids,
            trained=(True,) * num,
            writers=("student",) * num,
            stop=stop,
        )


@dataclass(frozen=True)
class State:
    """The state that a run carries from step to step beside weights and optimiser; in checkpoints,
    as plain data."""

    window: WindowState
    flops: float = 0.0


def write(
    recipe: GrpoRecipe,
    setup: GrpoSetup,
    prompts: Sequence[Prompt],
    seeds: Sequence[Key],
    window: int,
) -> list[Response]:
    """Let the model as it is now respond to each prompt, up to the window."""
    model = setup.model
    completions = sample(
        model.model,
        [prompt.token_ids for prompt in prompts],
        seeds,
        max_tokens=window,
        end_ids=setup.end_ids,
        sampling=recipe.sampling,
    )
    texts = model.tokenizer.batch_decode(
        [list(c.token_ids) for c in completions], skip_special_tokens=True
    )
    return [
        Response(
            prompt=prompt,
            completion=c,
            text=text,
            num_before_answer=num_tokens_to_answer(
                c.token_ids, text, model.tokenizer, setup.task.answer_end
            ),
        )
        for prompt, c, text in zip(prompts, completions, texts, strict=True)
    ]


def score(task: Task, responses: Sequence[Response]) -> list[float]:
    """The task's score of each response, which is the reward."""
    grades = task.grade(
        [response.prompt.example for response in responses],
        [response.text for response in responses],
    )
    return [grade.score for grade in grades]


def response_means(responses: Sequence[Response]) -> ResponseMeans:
    """Means per token (nats, of the distribution sampled from) and per response, by the names of
    the run log."""
    num_tokens = sum(len(response.completion.token_ids) for response in responses)
    num_before_answer = sum(response.num_before_answer for response in responses)
    before = [
        sum(response.completion.entropies[: response.num_before_answer]) for response in responses
    ]
    return {
        "student_entropy": sum(sum(response.completion.entropies) for response in responses)
        / num_tokens,
        "student_entropy_before_answer": sum(before) / num_before_answer,
        "length": num_tokens / len(responses),
        "truncation": sum(response.completion.stop == "length" for response in responses)
        / len(responses),
        "zlib_ratio": sum(zlib_ratio(response.text) for response in responses) / len(responses),
        "num_loss_tokens": num_tokens,
    }


def probe_grpo_window(
    recipe: GrpoRecipe, setup: GrpoSetup, state: WindowState, step: int
) -> tuple[Probe, float]:
    """Measure one response to each held-out prompt for the length gate, and count the operations
    that this took."""
    seeds = [
        stream_key((recipe.grpo.seed, step, place, 0), Stream.PROBE)
        for place in range(len(setup.probes))
    ]
    responses = write(recipe, setup, setup.probes, seeds, state.tokens)
    means = response_means(responses)
    probe = Probe(
        entropy=means["student_entropy_before_answer"],
        teacher_entropy=None,
        truncation=means["truncation"],
        teacher_truncation=0.0,
        repetition=sum(is_loop(response.text) for response in responses) / len(responses),
    )
    return probe, rollout_flops(
        [r.rollout for r in responses], {"student": setup.flops}, by_token=False
    )
