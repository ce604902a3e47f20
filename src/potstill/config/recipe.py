"""A whole recipe: fields that fit together. What follows the gradient of something else is
refused."""

import itertools
from typing import Any

from pydantic import model_validator

from potstill.config.fields import RecipeFields, Window
from potstill.config.roles import Role
from potstill.config.section import RecipeError, roles_of
from potstill.config.unread import check_weighting, unread_fields
from potstill.config.values import refuse_any, shown
from potstill.tasks import is_table
from potstill.tasks.own import own_task


class Recipe(RecipeFields):
    """The recipe of a run. Fields that the chosen mode does not read may not be set."""

    @model_validator(mode="after")
    def _every_set_field_is_read(self):
        self.refuse_unread()
        if self.objective.signal == "labels" and self.objective.prefix in ("student", "mixed"):
            raise ValueError(
                f'objective.signal = "labels" on {self.objective.prefix} prefixes has zero '
                "expected gradient where the student wrote; use teacher or dataset prefixes, or "
                'signal = "full"'
            )
        if self.objective.prefix == "mixed" and self.objective.prefix_mix == "handoff":
            low, high = self.objective.handoff_tokens
            if not 1 <= low <= high < self.window.tokens:
                raise ValueError(
                    f"objective.handoff_tokens is {[low, high]}; both must be at least 1, in "
                    f"order, and below window.tokens = {self.window.tokens}, so that the second "
                    "writer has something to write"
                )
        if self.objective.signal == "sampled":
            self._check_sampled_signal()
        check_weighting(self)
        self._check_reward()
        self._check_returns()
        self._check_schedules()
        self._check_extensions()
        if self.teacher.cache is not None and self.objective.prefix in ("student", "mixed"):
            raise ValueError(
                f'teacher.cache is set and objective.prefix is "{self.objective.prefix}": a '
                "cache knows the teacher on completions that are written already, and a "
                "student's are not; use teacher or dataset prefixes, or remove teacher.cache"
            )
        if self.teacher.cache is not None and self.teacher.model == "self":
            raise ValueError(
                'teacher.cache is set and teacher.model is "self"; name the model that the cache '
                "was built with"
            )
        if self.validation.patience is not None and self.validation.keep_best is None:
            raise ValueError(
                f"validation.patience is {self.validation.patience} and validation.keep_best "
                "names nothing that could get better; set it, or remove validation.patience"
            )
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(
                f"train.warmup_steps is {self.train.warmup_steps}, more than train.steps = "
                f"{self.train.steps}; lower it"
            )
        return self

    def _check_sampled_signal(self) -> None:
        """Refuse what would follow the gradient of something else (the table is in
        `potstill.objectives.estimators`)."""
        objective = self.objective
        direction = {"k1": "reverse", "k2": "reverse", "k3": "forward"}[objective.estimator]
        if objective.prefix != "student":
            raise ValueError(
                f'objective.signal = "sampled" on {objective.prefix} prefixes: the estimators '
                "are means over tokens that the student drew and follow another gradient on "
                'others; use prefix = "student" or signal = "full"'
            )
        if objective.kl != direction:
            raise ValueError(
                f"objective.estimator = {objective.estimator!r} has the gradient of the "
                f"{direction} KL, and objective.kl is {objective.kl!r}; set objective.kl = "
                f'"{direction}" or choose another estimator'
            )
        if not self.draws_exactly:
            raise ValueError(
                'objective.signal = "sampled" needs tokens drawn exactly from the student at '
                f"objective.temperature = {objective.temperature:g}: set sampling.temperature to "
                "it, top_p = 1 and top_k = 0"
            )
        if self.rollouts.reuse > 1:
            raise ValueError(
                f"rollouts.reuse is {self.rollouts.reuse}: after one update the student no "
                'longer is who drew the tokens, and signal = "sampled" has no importance '
                'weights; use reuse = 1 or signal = "full"'
            )

    def _check_reward(self) -> None:
        """Refuse a reward that nobody scores, or whose gradient would be that of something else."""
        objective, reward = self.objective, self.reward
        if objective.kl == "none" and not reward.weight:
            raise ValueError(
                'objective.kl is "none" and reward.weight is 0: there is nothing to learn from; '
                "raise reward.weight or choose a KL"
            )
        if self.is_scored and reward.source is None and is_table(self.data.origin):
            wants = (
                "reward.weight is above 0" if reward.weight else "objective.weights needs scores"
            )
            raise ValueError(
                f"{wants} and data.source is {self.data.origin!r}, whose responses nothing scores; "
                "name a function of yours in reward.source, or use a task"
            )
        if reward.source is not None and own_task(reward.source) is None:
            raise ValueError(
                f"reward.source is {reward.source!r}; name a function in a Python file of yours, "
                "as in my_reward.py:score, or leave it out for the task's scores"
            )
        if not reward.weight:
            return
        refuse_any(
            f"reward.weight is {reward.weight:g}",
            "weight = 0",
            (
                objective.prefix != "student",
                f'objective.prefix is "{objective.prefix}", and a policy gradient is of what the '
                'student wrote itself; use prefix = "student"',
            ),
            (
                objective.signal in ("topk", "labels"),
                f'objective.signal is "{objective.signal}"; use "full" or "sampled"',
            ),
            (
                not self.draws_exactly,
                f"sampling has temperature = {self.sampling.temperature:g}, top_p = "
                f"{self.sampling.top_p:g} and top_k = {self.sampling.top_k}, and the tokens must "
                "be drawn exactly from the student; set sampling.temperature = "
                "objective.temperature, top_p = 1 and top_k = 0",
            ),
            (
                reward.group_size == 1 and reward.advantage != "score",
                f'reward.group_size is 1 and reward.advantage is "{reward.advantage}": a score '
                "minus itself is 0; raise the group_size",
            ),
            (
                self.student.dropout and self.rollouts.reuse > 1,
                f"student.dropout is true and rollouts.reuse is {self.rollouts.reuse}: chance "
                "would be in the ratio to the student that wrote; use reuse = 1 or no dropout",
            ),
        )

    def _check_returns(self) -> None:
        """Refuse later tokens' costs where they would not be those of what the student wrote."""
        objective = self.objective
        if not objective.gamma:
            return
        refuse_any(
            f"objective.gamma is {objective.gamma:g}",
            "gamma = 0",
            (
                objective.prefix != "student",
                f'objective.prefix is "{objective.prefix}", and only tokens that the student '
                'wrote have a gradient of how they were written; use prefix = "student"',
            ),
            (
                objective.kl != "reverse",
                f'objective.kl is "{objective.kl}", and later tokens cost their reverse KL; '
                'use kl = "reverse"',
            ),
            (
                objective.signal != "full",
                f'objective.signal is "{objective.signal}"; use signal = "full"',
            ),
            (
                not self.draws_exactly,
                "the tokens must be drawn exactly from the student; set sampling.temperature = "
                "objective.temperature, top_p = 1 and top_k = 0",
            ),
            (
                self.rollouts.reuse > 1,
                f"rollouts.reuse is {self.rollouts.reuse}, and after one update the student "
                "no longer is who drew the tokens; use reuse = 1",
            ),
            (
                objective.weights is not None,
                "objective.weights is set, and the tokens' weights would not be the later "
                "tokens'; remove it",
            ),
            (
                self.train.normalize != "token",
                'train.normalize is "sequence", whose divisor depends on how long the '
                'student goes on; use "token"',
            ),
        )

    def _check_schedules(self) -> None:
        schedule, window = self.weight_schedule, self.window
        if schedule.schedule == "steps":
            steps = [step for step, _ in schedule.at_steps]
            if (
                not steps
                or steps != sorted(set(steps))
                or not all(0 <= weight <= 1 for _, weight in schedule.at_steps)
            ):
                raise ValueError(
                    f"weight_schedule.at_steps is {[list(pair) for pair in schedule.at_steps]}; "
                    "give pairs of a step and a forward weight between 0 and 1, with growing "
                    "steps"
                )
        low, high = schedule.bounds
        if (
            schedule.schedule == "entropy"
            and not 0 <= low <= self.objective.forward_weight <= high <= 1
        ):
            raise ValueError(
                f"weight_schedule.bounds is {[low, high]}; they must be in order, between 0 and "
                f"1, with objective.forward_weight = {self.objective.forward_weight:g} between "
                "them"
            )
        if window.schedule == "fixed":
            return
        _check_ladder(window)
        objective = self.objective
        if window.schedule == "entropy-gated" and window.reference == "teacher":
            refuse_any(
                'window.reference is "teacher"',
                'reference = "absolute"',
                (
                    self.teacher.cache is not None,
                    'teacher.cache is set and cannot score the student; use reference = "first"',
                ),
                (not objective.has_teacher, 'the recipe has none; use reference = "first"'),
            )
        if (
            objective.prefix == "mixed"
            and objective.prefix_mix == "handoff"
            and objective.handoff_tokens[1] >= window.start
        ):
            raise ValueError(
                f"objective.handoff_tokens is {list(objective.handoff_tokens)} and window.start "
                f"{window.start}; the first writer must leave something of every window"
            )

    def _check_extensions(self) -> None:
        pairs = self.train.extended
        until, steps = [u for u, _ in pairs], [*(s for _, s in pairs), self.train.steps]
        grow = all(
            a < b for a, b in [*itertools.pairwise([0, *until]), *itertools.pairwise([0, *steps])]
        )
        if not grow or any(u > s for u, s in pairs):
            raise ValueError(
                f"train.extended is {[list(pair) for pair in pairs]}; give pairs (step, steps), "
                "both growing, each step within its steps, and steps below train.steps = "
                f"{self.train.steps}"
            )
        if pairs and self.train.flops is not None:
            raise ValueError(
                "train.extended is set and train.flops, by which the run ends, too; remove one "
                "of them"
            )

    @property
    def method(self) -> str:
        """The name of this cell of the grid, and of the reward beside it."""
        parts = [self.objective.name]
        if self.reward.weight and self.objective.kl != "none":
            parts.append(f"{self.reward.weight:g} reward")
        if self.reward.start_kl:
            parts.append(f"{self.reward.start_kl:g} KL to the start")
        return " + ".join(parts)

    def unread(self) -> dict[str, str]:
        return unread_fields(self)


def _check_ladder(window: Window) -> None:
    """Refuse a first window above the cap, and a ladder that does not grow from the one to the
    other."""
    if window.start > window.tokens:
        raise ValueError(
            f"window.start is {window.start}, more than window.tokens = {window.tokens}; lower "
            "it or raise the cap"
        )
    if window.ladder is not None:
        rungs = [window.start, *window.ladder]
        if not window.ladder or rungs != sorted(set(rungs)) or rungs[-1] != window.tokens:
            raise ValueError(
                f"window.ladder is {list(window.ladder)}; it must grow from above window.start = "
                f"{window.start} to window.tokens = {window.tokens}"
            )


def role_of(name: str) -> Role:
    """The role of a dotted field. Raises KeyError for any other name."""
    return roles_of(Recipe)[name]


def fields_with(*roles: Role) -> tuple[str, ...]:
    """The dotted fields with these roles."""
    return tuple(name for name, role in roles_of(Recipe).items() if role in roles)


def check_recipe(given: Any) -> None:
    """Raise RecipeError for what is given from Python and is no recipe."""
    if not isinstance(given, Recipe):
        raise RecipeError(
            f"the recipe is {shown(given)}; give a Recipe, such as load_recipe(NAME) returns"
        )
