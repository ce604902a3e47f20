"""Procedural reasoning tasks of the reasoning-gym package, by name:
`reasoning-gym:gsm_symbolic`."""

from collections.abc import Sequence

from potstill.answers.grading import Grade
from potstill.types import Example

# The data sets' scorers take the answer alone: of a whole response, some would score the first
# number in it.
TAG_INSTRUCTION = "\n\nEnd with the final answer alone between <answer> and </answer>."


class ReasoningGym:
    """A reasoning-gym data set. The splits are different seeds, so a small task can repeat problems
    between them."""

    def __init__(self, name: str | None):
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            import difflib

            nearest = difflib.get_close_matches(str(name), sorted(DATASETS), 3, cutoff=0)
            raise ValueError(
                f"reasoning-gym has no task {name!r}; the nearest are {', '.join(nearest)}"
            )
        self.name = name
        self._entries: dict[str, tuple] = {}

    def examples(self, split: str, num_examples: int, seed: int) -> list[Example]:
        import reasoning_gym

        if split not in ("train", "test"):
            raise ValueError(f'reasoning-gym has no split {split!r}; choose "train" or "test"')
        dataset = reasoning_gym.create_dataset(
            self.name, size=num_examples, seed=2 * seed + (split == "test")
        )
        examples = []
        for i, entry in enumerate(dataset):
            example = Example(
                id=f"{split}-{seed}-{i}",
                prompt=entry["question"] + TAG_INSTRUCTION,
                answer=str(entry["answer"]),
            )
            self._entries[example.id] = (dataset, entry)
            examples.append(example)
        return examples

    def grade(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Grade]:
        """The data set's own score of the last text in `<answer>` tags; 0 when there is none."""
        from reasoning_gym.utils import extract_answer

        grades = []
        for example, response in zip(examples, responses, strict=True):
            dataset, entry = self._entries[example.id]
            answer = extract_answer(response)
            # Some data sets would give a missing answer a part of the score.
            score = (
                0.0 if answer is None else float(dataset.score_answer(answer=answer, entry=entry))
            )
            grades.append(Grade(score, answer))
        return grades

    def answer_end(self, response: str) -> int | None:
        """Just after the first `</answer>`."""
        end = response.find("</answer>")
        return end + len("</answer>") if end >= 0 else None
