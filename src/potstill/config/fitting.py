"""Fields of a recipe that must fit together. What would follow the gradient of something else is
refused."""

import itertools

from potstill.config.fields import RecipeFields
from potstill.config.fitting_teachers import refuse_misplaced_teachers
from potstill.config.sections.models import StudentSpec
from potstill.config.sections.window import Window
from potstill.config.values import refuse_any
from potstill.config.weightings import WEIGHTINGS
from potstill.tasks import is_table
from potstill.tasks.own import own_task


def refuse_misfits(recipe: RecipeFields) -> None:
    """Raise ValueError for fields that do not fit together."""
    if recipe.objective.signal == "labels" and recipe.objective.prefix in ("student", "mixed"):
        raise ValueError(
            f'objective.signal = "labels" on {recipe.objective.prefix} prefixes has zero '
            "expected gradient where the student wrote; use teacher or dataset prefixes, or "
            'signal = "full"'
        )
    if recipe.objective.prefix == "mixed" and recipe.objective.prefix_mix == "handoff":
        low, high = recipe.objective.handoff_tokens
        if not 1 <= low <= high < recipe.window.tokens:
            raise ValueError(
                f"objective.handoff_tokens is {[low, high]}; both must be at least 1, in "
                f"order, and below window.tokens = {recipe.window.tokens}, so that the second "
                "writer has something to write"
            )
    if recipe.objective.signal in ("sampled", "spans"):
        _check_estimate(recipe)
    refuse_misplaced_teachers(recipe)
    _check_reward(recipe)
    _check_returns(recipe)
    _check_schedules(recipe)
    _check_extensions(recipe)
    _check_lora(recipe.student)
    if recipe.rollouts.engine != "native":
        _check_engine(recipe)
    if recipe.engine.importance_cap is not None and not recipe.draws_exactly:
        raise ValueError(
            "engine.importance_cap is set and tokens are not drawn exactly from the student; set "
            "sampling.temperature = objective.temperature, top_p = 1 and top_k = 0, or remove it"
        )
    if recipe.teacher.cache is not None:
        _check_cache(recipe)
    if recipe.validation.patience is not None and recipe.validation.keep_best is None:
        raise ValueError(
            f"validation.patience is {recipe.validation.patience} and validation.keep_best "
            "names nothing that could get better; set it, or remove validation.patience"
        )
    if recipe.train.warmup_steps > recipe.train.steps:
        raise ValueError(
            f"train.warmup_steps is {recipe.train.warmup_steps}, more than train.steps = "
            f"{recipe.train.steps}; lower it"
        )


def _check_cache(recipe: RecipeFields) -> None:
    """Refuse what a cache does not know, and what has another gradient where an older student
    wrote."""
    objective = recipe.objective
    refuse_any(
        "teacher.cache is set",
        "remove teacher.cache",
        (
            recipe.teacher.model == "self",
            'teacher.model is "self"; name the model that the cache was built with',
        ),
        (
            objective.prefix == "mixed",
            'objective.prefix is "mixed", and a cache has one writer; use "teacher", "student" or '
            '"dataset", whichever wrote it',
        ),
    )
    older = "and an older student wrote the cached prefixes"
    weights = WEIGHTINGS.get(objective.weights or "")
    is_reward = weights is not None and weights.is_reward
    is_older = recipe.has_older_prefixes
    refuse_any(
        "teacher.cache is set",
        "remove teacher.cache",
        (
            is_older and bool(recipe.reward.weight),
            f"reward.weight is {recipe.reward.weight:g}, {older}: a policy gradient is of what the "
            "student writes now",
        ),
        (
            is_older and bool(objective.gamma),
            f"objective.gamma is {objective.gamma:g}, {older}; use gamma = 0",
        ),
        (
            is_older
            and (objective.signal == "sampled" or is_reward)
            and recipe.engine.importance_cap is None,
            f'"{objective.weights if is_reward else objective.signal}" is a mean over drawn '
            f"tokens, {older}; set engine.importance_cap, such as 2, which weighs each token with "
            'the ratio of both probabilities, use signal = "full"',
        ),
        (
            recipe.is_scored and recipe.reward.group_size > 1,
            f"reward.group_size is {recipe.reward.group_size}, and a group would be one cached "
            "response many times; use group_size = 1",
        ),
    )


def _check_lora(student: StudentSpec) -> None:
    if student.lora.rank is None:
        return
    if student.init == "random":
        raise ValueError(
            'student.lora is set and student.init is "random": fresh weights would stay as they '
            "were drawn; remove student.lora, and all of them learn"
        )
    if not student.lora.targets:
        raise ValueError(
            "student.lora.targets is empty, so there is nothing to learn; name ends of names of "
            'linear layers, or use "all-linear"'
        )


def _check_engine(recipe: RecipeFields) -> None:
    """Refuse what an engine in another process cannot write."""
    objective, engine = recipe.objective, recipe.engine
    refuse_any(
        f'rollouts.engine is "{recipe.rollouts.engine}"',
        'engine = "native"',
        (
            objective.prefix == "mixed" and objective.prefix_mix == "token",
            'objective.prefix_mix is "token", which draws from both models at each token; use '
            '"sequence" or "handoff"',
        ),
        (
            engine.url is not None and objective.prefix != "student",
            f'engine.url is set and objective.prefix is "{objective.prefix}", of which a server '
            "that holds the student writes no or only a part; remove engine.url",
        ),
        (
            recipe.teacher.model == "self" and objective.prefix in ("teacher", "mixed"),
            f'teacher.model is "self" and objective.prefix is "{objective.prefix}": there is no '
            "model of its own to serve; use another teacher",
        ),
    )


def _check_estimate(recipe: RecipeFields) -> None:
    """Refuse what would follow the gradient of something else (the table is in
    `potstill.objectives.estimators`)."""
    objective = recipe.objective
    signal, instead = f'objective.signal = "{objective.signal}"', ""
    if objective.signal == "sampled":
        instead = ' or signal = "full"'
    direction = {"k1": "reverse", "k2": "reverse", "k3": "forward"}[objective.estimator]
    if objective.prefix != "student":
        raise ValueError(
            f"{signal} on {objective.prefix} prefixes: the estimators "
            "are means over tokens that the student drew and follow another gradient on "
            f'others; use prefix = "student"{instead}'
        )
    if objective.kl != direction:
        raise ValueError(
            f"objective.estimator = {objective.estimator!r} has the gradient of the "
            f"{direction} KL, and objective.kl is {objective.kl!r}; set objective.kl = "
            f'"{direction}" or choose another estimator'
        )
    if not recipe.draws_exactly:
        raise ValueError(
            f"{signal} needs tokens drawn exactly from the student at "
            f"objective.temperature = {objective.temperature:g}: set sampling.temperature to "
            "it, top_p = 1 and top_k = 0"
        )
    if recipe.rollouts.reuse > 1:
        raise ValueError(
            f"rollouts.reuse is {recipe.rollouts.reuse}: after one update the student no "
            f"longer is who drew the tokens, and {signal} has no importance "
            f"weights; use reuse = 1{instead}"
        )


def _check_reward(recipe: RecipeFields) -> None:
    """Refuse a reward that nobody scores, or whose gradient would be that of something else."""
    objective, reward = recipe.objective, recipe.reward
    if objective.kl == "none" and not reward.weight:
        raise ValueError(
            'objective.kl is "none" and reward.weight is 0: there is nothing to learn from; '
            "raise reward.weight or choose a KL"
        )
    if recipe.is_scored and reward.source is None and is_table(recipe.data.origin):
        wants = "reward.weight is above 0" if reward.weight else "objective.weights needs scores"
        raise ValueError(
            f"{wants} and data.source is {recipe.data.origin!r}, whose responses nothing scores; "
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
            not recipe.draws_exactly,
            f"sampling has temperature = {recipe.sampling.temperature:g}, top_p = "
            f"{recipe.sampling.top_p:g} and top_k = {recipe.sampling.top_k}, and the tokens must "
            "be drawn exactly from the student; set sampling.temperature = "
            "objective.temperature, top_p = 1 and top_k = 0",
        ),
        (
            reward.group_size == 1 and reward.advantage != "score",
            f'reward.group_size is 1 and reward.advantage is "{reward.advantage}": a score '
            "minus itself is 0; raise the group_size",
        ),
        (
            recipe.student.dropout and recipe.rollouts.reuse > 1,
            f"student.dropout is true and rollouts.reuse is {recipe.rollouts.reuse}: chance "
            "would be in the ratio to the student that wrote; use reuse = 1 or no dropout",
        ),
    )


def _check_returns(recipe: RecipeFields) -> None:
    """Refuse later tokens' costs where they would not be those of what the student wrote."""
    objective = recipe.objective
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
            not recipe.draws_exactly,
            "the tokens must be drawn exactly from the student; set sampling.temperature = "
            "objective.temperature, top_p = 1 and top_k = 0",
        ),
        (
            recipe.rollouts.reuse > 1,
            f"rollouts.reuse is {recipe.rollouts.reuse}, and after one update the student "
            "no longer is who drew the tokens; use reuse = 1",
        ),
        (
            objective.weights is not None,
            "objective.weights is set, and the tokens' weights would not be the later "
            "tokens'; remove it",
        ),
        (
            recipe.train.normalize != "token",
            'train.normalize is "sequence", whose divisor depends on how long the '
            'student goes on; use "token"',
        ),
    )


def _check_schedules(recipe: RecipeFields) -> None:
    schedule, window = recipe.weight_schedule, recipe.window
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
        and not 0 <= low <= recipe.objective.forward_weight <= high <= 1
    ):
        raise ValueError(
            f"weight_schedule.bounds is {[low, high]}; they must be in order, between 0 and "
            f"1, with objective.forward_weight = {recipe.objective.forward_weight:g} between "
            "them"
        )
    if window.schedule == "fixed":
        return
    _check_ladder(window)
    objective = recipe.objective
    if window.schedule == "entropy-gated" and window.reference == "teacher":
        refuse_any(
            'window.reference is "teacher"',
            'reference = "absolute"',
            (
                recipe.teacher.cache is not None,
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


def _check_extensions(recipe: RecipeFields) -> None:
    pairs = recipe.train.extended
    until, steps = [u for u, _ in pairs], [*(s for _, s in pairs), recipe.train.steps]
    grow = all(
        a < b for a, b in [*itertools.pairwise([0, *until]), *itertools.pairwise([0, *steps])]
    )
    if not grow or any(u > s for u, s in pairs):
        raise ValueError(
            f"train.extended is {[list(pair) for pair in pairs]}; give pairs (step, steps), "
            "both growing, each step within its steps, and steps below train.steps = "
            f"{recipe.train.steps}"
        )
    if pairs and recipe.train.flops is not None:
        raise ValueError(
            "train.extended is set and train.flops, by which the run ends, too; remove one of them"
        )


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
