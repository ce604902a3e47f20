"""A reward of your own: a function that scores responses, in the place of a task's scores. A recipe
names it:

    [objective]
    prefix = "student"
    kl = "reverse"

    [reward]
    weight = 1.0
    group_size = 4
    source = "examples/my_reward.py:score"

Any numbers will do, as each response is compared with the others to the same prompt. They may be
your own model's, or those of any library that is installed.
"""

import re

from potstill import Example


def score(examples: list[Example], responses: list[str]) -> list[float]:
    """1 for a response whose last `#digits` is the answer, less a thousandth for each character."""
    scores = []
    for example, response in zip(examples, responses, strict=True):
        answers = re.findall(r"#(\d+)", response)
        is_right = bool(answers) and answers[-1] == example.answer
        scores.append(is_right - len(response) / 1000)
    return scores
