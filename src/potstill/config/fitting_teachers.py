"""Fields of the teachers that must fit together."""

from potstill.config.fields import RecipeFields
from potstill.config.sections.validation import WITHOUT_TEACHER
from potstill.config.values import refuse_any
from potstill.config.weightings import WEIGHTINGS


def refuse_misplaced_teachers(recipe: RecipeFields) -> None:
    """Raise ValueError for teachers that are not where they would have to be, or too many."""
    if recipe.teacher.model == "start":
        raise ValueError(
            'teacher.model is "start", which is for tables [[teachers]]; use "self", which is the '
            "student as it was at first"
        )
    _check_placement(recipe)
    if recipe.teacher.url is not None and recipe.teacher.protocol == "logprobs":
        _check_log_probs(recipe)
    if recipe.objective.signal == "spans":
        _check_spans(recipe)
    if recipe.teachers:
        _check_several(recipe)


def _check_placement(recipe: RecipeFields) -> None:
    """Refuse a teacher that is not here, or not whole, where it would have to write, or to follow
    the student."""
    teacher, prefix = recipe.teacher, recipe.objective.prefix
    by_token = prefix == "mixed" and recipe.objective.prefix_mix == "token"
    where = {
        f"teacher.url is {teacher.url!r}": teacher.url is not None,
        f'teacher.placement is "{teacher.placement}"': teacher.placement != "replicated",
    }
    if teacher.device is not None:
        refuse_any(
            f"teacher.device is {teacher.device!r}",
            "leave it out",
            (
                teacher.placement != "replicated",
                f'teacher.placement is "{teacher.placement}", which says where it is',
            ),
            (
                by_token,
                'objective.prefix_mix is "token", which draws from both models on one device',
            ),
        )
    for says in (says for says, is_so in where.items() if is_so):
        refuse_any(
            says,
            "leave it out",
            (
                teacher.url is not None and by_token,
                'objective.prefix_mix is "token", for which both must be here; use "handoff"',
            ),
            (
                teacher.url is None and prefix in ("teacher", "mixed") and teacher.cache is None,
                f'objective.prefix is "{prefix}", and such a teacher does not write; let it write '
                "into a cache first (`potstill cache build`, with --payload completions if it is "
                "to score live)",
            ),
        )


def _check_log_probs(recipe: RecipeFields) -> None:
    """Refuse what log-probabilities of some tokens do not tell."""
    objective, weights = recipe.objective, recipe.objective.weights
    refuse_any(
        'teacher.protocol is "logprobs"',
        'use "states"',
        (
            objective.prefix in ("teacher", "mixed") and recipe.teacher.cache is None,
            f'objective.prefix is "{objective.prefix}", and such a teacher does not write; use '
            '"student" or "dataset"',
        ),
        (
            objective.has_divergence and objective.signal not in ("sampled", "spans", "topk"),
            f'objective.signal is "{objective.signal}", which takes whole distributions; use '
            '"sampled", "spans" or "topk"',
        ),
        (
            objective.temperature != 1,
            f"objective.temperature is {objective.temperature:g}, at which whole distributions "
            "would have to be made anew; use 1",
        ),
        (
            objective.signal == "sampled" and objective.baseline == "exact",
            'objective.baseline is "exact", which takes whole distributions; use "none"',
        ),
        (
            weights is not None and (weights == "entropy-aware" or weights not in WEIGHTINGS),
            f'objective.weights is "{weights}", which may read the teacher\'s entropy; choose '
            "another weighting",
        ),
        (
            recipe.weight_schedule.schedule == "entropy",
            'weight_schedule.schedule is "entropy", which reads the teacher\'s; choose another',
        ),
        (
            recipe.window.schedule == "entropy-gated" and recipe.window.reference == "teacher",
            'window.reference is "teacher", whose entropy is not known; use "first"',
        ),
    )


def _check_spans(recipe: RecipeFields) -> None:
    """Refuse what takes a teacher that knows the student's tokens, and weights of single tokens."""
    goal, validation = recipe.validation.keep_best, recipe.validation
    refuse_any(
        'objective.signal is "spans", for a teacher with another tokenizer',
        "choose a teacher with the student's tokenizer and another signal",
        (
            recipe.teacher.cache is not None,
            "teacher.cache is set, which has the signal on tokens of one tokenizer; remove it",
        ),
        (
            recipe.objective.weights is not None,
            f'objective.weights is "{recipe.objective.weights}", which weighs single tokens; '
            "remove it",
        ),
        (
            recipe.reward.weight > 0,
            f"reward.weight is {recipe.reward.weight:g}, and a reward is of all tokens, where "
            "spans leave some out; use weight = 0",
        ),
        (
            recipe.window.schedule == "entropy-gated" and recipe.window.reference == "teacher",
            'window.reference is "teacher", whose entropy on the student\'s tokens is not known; '
            'use "first"',
        ),
        (
            validation.num_prompts != 0 and goal not in WITHOUT_TEACHER,
            f'validation.keep_best is "{goal}", which compares tokens; use "score", '
            '"truncation" or "repetition"',
        ),
    )


def _check_several(recipe: RecipeFields) -> None:
    """Refuse what is about one teacher alone."""
    objective, teacher = recipe.objective, recipe.teacher
    names = ["teacher", *(each.name for each in recipe.teachers)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f'teachers has the name "{twice}" twice, or that of the first one; give each a name '
            "of its own"
        )
    if other := next((each for each in recipe.teachers if each.model == "self"), None):
        raise ValueError(
            f'teachers has "{other.name}" with model = "self"; use "start" for the student as it '
            'was at first, or teacher.model = "self"'
        )
    if other := next((each for each in recipe.teachers if each.protocol == "logprobs"), None):
        raise ValueError(
            f'teachers has "{other.name}" with protocol = "logprobs", and beside others a teacher '
            'gives whole distributions; use "states"'
        )
    if other := next((each for each in recipe.teachers if each.placement == "sharded"), None):
        raise ValueError(
            f'teachers has "{other.name}" with placement = "sharded", and ranks would not pass '
            'through it together; use "replicated" or "offloaded"'
        )
    refuse_any(
        f"teachers names {len(recipe.teachers)} beside the first one",
        "leave them out",
        (
            not objective.has_divergence,
            "the objective has no divergence from a teacher; choose a KL and a signal",
        ),
        (
            objective.signal != "full",
            f'objective.signal is "{objective.signal}", which is of one teacher; use "full"',
        ),
        (
            objective.gamma > 0,
            f"objective.gamma is {objective.gamma:g}, whose returns are of one teacher; use 0",
        ),
        (
            objective.weights is not None,
            f'objective.weights is "{objective.weights}", which looks at one teacher; remove it',
        ),
        (
            teacher.cache is not None,
            "teacher.cache is set, which holds one teacher; remove it",
        ),
        (
            teacher.placement == "sharded",
            'teacher.placement is "sharded", and ranks would not pass through it together; use '
            '"replicated" or "offloaded"',
        ),
    )
