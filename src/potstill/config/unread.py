"""Which field and which weighting needs which mode. A field that the chosen mode does not read may
not be set, and is not in the hash."""

from typing import Any

from potstill.config.fields import RecipeFields
from potstill.config.sections.data import Data
from potstill.config.sections.models import StudentSpec, TeacherModel, TeacherSpec
from potstill.config.sections.objective import Objective
from potstill.config.sections.validation import Validation
from potstill.config.sections.window import Window
from potstill.config.values import refuse_any
from potstill.config.weightings import WEIGHTINGS, check_named
from potstill.tasks import is_table
from potstill.tasks.own import own_task
from potstill.tasks.tables import is_hub_id, sources

# Fields of a teacher that is here, and of one behind a URL.
_HERE = ("attention", "placement", "device")
_THERE = ("protocol", "wire_dtype", "token_variable", "patience")


def unread_fields(recipe: RecipeFields) -> dict[str, str]:
    """Fields (or whole sections) that the recipe's mode does not read, with the reason."""
    objective = recipe.objective
    unread = _unread_of_prefix(objective) | _unread_of_kl(recipe) | _unread_of_window(recipe.window)
    unread |= _unread_of_signal(recipe)
    if objective.weights is None:
        unread["objective.weights_arguments"] = "objective.weights is not set"
    unread |= _unread_of_reward(recipe)
    if objective.prefix == "dataset":
        unread["sampling"] = unread["rollouts"] = (
            'objective.prefix is "dataset", so nothing is sampled in training'
        )
    else:
        unread["data.train_on"] = (
            f'objective.prefix is "{objective.prefix}", whose completions are not the data\'s'
        )
    unread |= _unread_of_student(recipe.student)
    if recipe.student.dtype != "float32" or recipe.student.lora.rank is not None:
        unread["rollouts.dtype"] = "the student writes with its own weights, in student.dtype"
    if recipe.student.dtype != "bfloat16" or recipe.student.lora.rank is not None:
        unread["train.stochastic_rounding"] = "the weights that learn are in float32"
    unread |= _unread_of_engine(recipe)
    unread |= _unread_of_teacher(recipe.teacher) | _unread_of_data(recipe.data)
    if not recipe.teachers:
        reason = "there is one teacher; others are tables [[teachers]]"
        unread |= {"teacher.weight": reason, "teacher.only": reason}
    if recipe.train.loss_backend == "plain":
        unread["train.loss_memory"] = 'train.loss_backend is "plain", which keeps all logits'
    unread |= _unread_of_validation(recipe.validation)
    if recipe.evaluation.source is None:
        unread["evaluation"] = "evaluation.source is not set, so nothing is evaluated"
    return unread


def _unread_of_engine(recipe: RecipeFields) -> dict[str, str]:
    unread: dict[str, str] = {}
    if recipe.rollouts.engine == "native":
        reason = 'rollouts.engine is "native", which is this process'
        # Where nothing is said, a GPU may compute in bfloat16.
        writes_in = recipe.writes_in(recipe.train.compute_dtype or "bfloat16")
        # An older student is off as an engine is.
        if writes_in == recipe.student.dtype and not recipe.has_older_prefixes:
            return {"engine": f'{reason}, and rollouts.dtype is not "bfloat16"'}
        fields = ("python", "args", "url", "sleep", "timeout")
        unread |= {f"engine.{name}": reason for name in fields}
    elif recipe.engine.url is not None:
        reason = "engine.url is set, so no server is started"
        unread |= {"engine.python": reason, "engine.args": reason, "engine.sleep": reason}
    if recipe.has_older_prefixes:
        reason = "teacher.cache is set, so no prefixes are written"
        unread |= {f"engine.{name}": reason for name in ("warn_above", "stop_above")}
    if recipe.objective.prefix not in ("student", "mixed"):
        reason = f'objective.prefix is "{recipe.objective.prefix}", so the student writes nothing'
        unread |= {
            f"engine.{name}": reason for name in ("warn_above", "stop_above", "importance_cap")
        }
    elif recipe.objective.signal == "spans":
        unread["engine.importance_cap"] = (
            'objective.signal is "spans", and the ratio that it caps is that of single tokens'
        )
    elif not recipe.rewards_tokens:
        unread["engine.importance_cap"] = (
            "the gradient is that of whole distributions, which need no weights"
        )
    return unread


def _unread_of_validation(validation: Validation) -> dict[str, str]:
    if validation.num_prompts == 0:
        fields = [field for field in Validation.model_fields if field != "num_prompts"]
        return {
            f"validation.{field}": "validation.num_prompts is 0, so nothing is validated"
            for field in fields
        }
    source = validation.source
    if source is None:
        return {
            "validation.split": "validation.source is not set, and the prompts come from the data"
        }
    if is_table(source) and not any(is_table(name) and is_hub_id(name) for name in sources(source)):
        return {
            "validation.split": f"validation.source is the file {source!r}, which has no splits"
        }
    return {}


def _unread_of_prefix(objective: Objective) -> dict[str, str]:
    unread: dict[str, str] = {}
    if objective.prefix != "mixed":
        reason = f'objective.prefix is "{objective.prefix}" and only "mixed" has two writers'
        unread |= {
            f"objective.{name}": reason
            for name in ("prefix_mix", "student_share", "first_writer", "handoff_tokens")
        }
    elif objective.prefix_mix == "handoff":
        unread["objective.student_share"] = (
            'objective.prefix_mix is "handoff", whose share follows from the lengths'
        )
    else:
        reason = (
            f'objective.prefix_mix is "{objective.prefix_mix}" and only "handoff" has a '
            "first writer"
        )
        unread |= {f"objective.{name}": reason for name in ("first_writer", "handoff_tokens")}
    return unread


def _unread_of_kl(recipe: RecipeFields) -> dict[str, str]:
    objective = recipe.objective
    unread: dict[str, str] = {}
    if objective.kl != "mixed":
        reason = f'objective.kl is "{objective.kl}" and only "mixed" has a forward weight'
        unread |= {
            "objective.forward_weight": reason,
            "weight_schedule": reason,
        }
    else:
        of_schedule = {
            "linear": ("end_weight", "over_steps"),
            "cosine": ("end_weight", "over_steps"),
            "steps": ("at_steps",),
            "entropy": ("reference", "floor", "band", "rate", "bounds"),
        }
        unread |= _unread_of_schedule("weight_schedule", recipe.weight_schedule, of_schedule)
    if objective.kl != "jsd":
        unread["objective.jsd_weight"] = f'objective.kl is "{objective.kl}" and only "jsd" reads it'
    if not objective.kl.startswith("skew"):
        unread["objective.skew"] = (
            f'objective.kl is "{objective.kl}" and only the skew KLs are skewed'
        )
    return unread


def _unread_of_signal(recipe: RecipeFields) -> dict[str, str]:
    objective = recipe.objective
    unread: dict[str, str] = {}
    if objective.signal != "topk":
        unread["objective.top_k"] = (
            f'objective.signal is "{objective.signal}" and only "topk" keeps some tokens apart'
        )
    if objective.signal == "spans":
        unread |= _unread_of_spans()
    elif objective.signal != "sampled":
        reason = (
            f'objective.signal is "{objective.signal}" and only "sampled" and "spans" are estimated'
        )
        unread |= {"objective.estimator": reason, "objective.baseline": reason}
    elif objective.estimator != "k1":
        unread["objective.baseline"] = (
            f'objective.estimator is "{objective.estimator}" and only "k1" has a reward'
        )
    if objective.end_class == "raw":
        unread["objective.separate_ends"] = (
            'objective.end_class is "raw", which keeps every end token apart'
        )
    if objective.signal == "labels":
        reason = (
            'objective.signal is "labels", which has no KL and needs no teacher\'s distribution'
        )
        fields = (
            "kl",
            "forward_weight",
            "jsd_weight",
            "skew",
            "weights",
            "weights_arguments",
            "gamma",
            "temperature",
            "end_class",
            "separate_ends",
        )
        unread |= {f"objective.{field}": reason for field in fields} | {"weight_schedule": reason}
        if objective.prefix != "teacher":
            unread["teacher"] = reason
    elif objective.kl == "none":
        reason = 'objective.kl is "none", and there is no teacher'
        fields = ("signal", "gamma", "weights", "weights_arguments", "end_class", "separate_ends")
        unread |= {f"objective.{field}": reason for field in fields}
        unread |= {"teacher": reason, "rollouts.end_set": reason}
    return unread


def _unread_of_spans() -> dict[str, str]:
    reason = 'objective.signal is "spans", where each model has end tokens of its own'
    return {
        "objective.end_class": reason,
        "objective.separate_ends": reason,
        "rollouts.end_set": reason,
        "objective.baseline": (
            'objective.signal is "spans", and no whole distribution over spans is known'
        ),
    }


def _unread_of_reward(recipe: RecipeFields) -> dict[str, str]:
    reward = recipe.reward
    unread: dict[str, str] = {}
    if not reward.weight:
        unread |= dict.fromkeys(("reward.advantage", "reward.clip"), "reward.weight is 0")
    elif recipe.rollouts.reuse == 1:
        unread["reward.clip"] = "rollouts.reuse is 1, and a ratio of 1 is never clipped"
    if not recipe.is_scored:
        reason = "reward.weight is 0 and objective.weights needs no scores"
        unread |= dict.fromkeys(("reward.group_size", "reward.truncated", "reward.source"), reason)
    return unread


def _unread_of_student(student: StudentSpec) -> dict[str, str]:
    if student.lora.rank is None:
        return {"student.lora": "student.lora.rank is not set, so there is no adapter"}
    if not student.dropout:
        return {"student.lora.dropout": "student.dropout is false, so nothing is dropped"}
    return {}


def _unread_of_teacher(teacher: TeacherSpec) -> dict[str, str]:
    unread: dict[str, str] = {}
    model = teacher.model
    if teacher.prompt_template is not None:
        unread["teacher.prompt_column"] = (
            "teacher.prompt_template is set, which takes the place of a column"
        )
    unread |= {f"teacher.{name}": reason for name, reason in unread_of_place(teacher).items()}
    if model == "self":
        unread["rollouts.end_set"] = 'teacher.model is "self", which ends as the student does'
    else:
        reason = f'teacher.model is {model!r} and only "self" can follow the student'
        unread |= {f"teacher.{name}": reason for name in ("refresh_steps", "ema")}
    return unread


def unread_of_place(teacher: TeacherModel) -> dict[str, str]:
    """Fields of one teacher that are not read where its model is, with the reason."""
    if teacher.model in ("self", "start"):
        reason = f'its model is "{teacher.model}", which is loaded as the student is'
        return dict.fromkeys(("dtype", "trust_remote_code", "url", *_HERE, *_THERE), reason)
    if teacher.url is None:
        return dict.fromkeys(_THERE, "its url is not set, and the teacher is here")
    unread: dict[str, str] = dict.fromkeys(_HERE, "its url is set, and the teacher is there")
    if teacher.protocol == "logprobs":
        unread |= dict.fromkeys(("dtype", "wire_dtype"), 'its protocol is "logprobs"')
    return unread


def _unread_of_template(data: Data) -> dict[str, str]:
    if data.template != "raw":
        return {}
    return {"data.system": 'data.template is "raw", and a system prompt needs a chat'}


def _unread_of_data(data: Data) -> dict[str, str]:
    unread = _unread_of_template(data)
    source = data.origin
    if data.sources:
        reason = "data.sources is set, whose tables say this of each"
        unread |= dict.fromkeys(
            ("data.source", "data.split", "data.config", "data.num_prompts"), reason
        )
        if all(each.level for each in data.sources):
            unread["data.level_column"] = "each of data.sources has a level"
    if not is_table(source):
        reason = f"data.source is the task {source!r}, which has no columns"
        unread |= dict.fromkeys(
            (
                *("data.prompt_column", "data.prompt_template", "data.level_column"),
                *("data.train_on", "teacher.prompt_column", "teacher.prompt_template"),
            ),
            reason,
        )
        unread["data.config"] = f"data.source is the task {source!r}, which has one configuration"
        return unread
    unread["data.seed"] = "only a task makes problems from a seed"
    if data.prompt_template is not None:
        unread["data.prompt_column"] = (
            "data.prompt_template is set, which takes the place of a column"
        )
    if not data.sources and not any(is_hub_id(name) for name in sources(source)):
        reason = f"data.source is the file {source!r}, which has no splits and no configurations"
        unread |= {"data.split": reason, "data.config": reason}
    return unread


def _unread_of_window(window: Window) -> dict[str, str]:
    of_schedule = {
        "linear": ("start", "over_steps"),
        "entropy-gated": (
            *("start", "ladder", "check_every", "num_probes", "patience", "reference", "threshold"),
            *("max_truncation", "max_repetition", "sticky", "step_back"),
        ),
    }
    return _unread_of_schedule("window", window, of_schedule)


def _unread_of_schedule(
    section: str, settings: Any, of_schedule: dict[str, tuple[str, ...]]
) -> dict[str, str]:
    """The fields that only other schedules of a section read."""
    read = of_schedule.get(settings.schedule, ())
    known = {field for fields in of_schedule.values() for field in fields}
    return {
        f"{section}.{f}": f'{section}.schedule is "{settings.schedule}"'
        for f in sorted(known - set(read))
    }


def check_weighting(recipe: RecipeFields) -> None:
    """Raise ValueError for a weighting that is not there, and for one that does not fit the rest of
    the recipe."""
    objective = recipe.objective
    if (name := objective.weights) is None or own_task(name) is not None:
        return
    check_named(name, objective.weights_arguments)
    weighting, arguments = WEIGHTINGS[name], objective.weighting_arguments
    refuse_any(
        f"objective.weights is {name!r}",
        "choose another weighting",
        (
            bool(weighting.kls) and objective.kl not in weighting.kls,
            f'objective.kl is "{objective.kl}"; the weighting is of kl = '
            f'"{" or ".join(weighting.kls)}"',
        ),
        (
            weighting.needs_student and objective.prefix != "student",
            f'objective.prefix is "{objective.prefix}", and it weighs what the student wrote; '
            'use prefix = "student"',
        ),
        (
            weighting.needs_log_probs and objective.signal == "topk",
            'objective.signal is "topk", and it reads how likely the written token is, which '
            'that does not say; use signal = "full"',
        ),
        (
            weighting.needs_head_share and objective.signal != "full",
            f'objective.signal is "{objective.signal}", and it compares whole distributions; use '
            'signal = "full"',
        ),
        (
            weighting.is_reward and not recipe.draws_exactly,
            "the tokens that it rewards must be drawn exactly from the student; set "
            "sampling.temperature = objective.temperature, top_p = 1 and top_k = 0",
        ),
        (
            weighting.is_reward and recipe.rollouts.reuse > 1,
            f"rollouts.reuse is {recipe.rollouts.reuse}, and after one update the student no "
            "longer is who drew the tokens that it rewards; use reuse = 1",
        ),
        (
            name == "by-writer" and objective.prefix != "mixed",
            f'objective.prefix is "{objective.prefix}", which has one writer; use prefix = "mixed"',
        ),
        (
            name == "pass-rate" and recipe.reward.group_size == 1,
            "reward.group_size is 1: one score is no rate; raise it",
        ),
        (
            name == "split" and arguments["at"] >= recipe.window.tokens,
            f"weights_arguments.at is {arguments.get('at')} and window.tokens "
            f"{recipe.window.tokens}: nothing comes after the split; lower it",
        ),
        (
            name == "split" and not arguments["before"] and not arguments["after"],
            "weights_arguments has before = 0 and after = 0: no token has a weight; raise one "
            "of them",
        ),
        (
            weighting.needs_older and not recipe.has_older_prefixes,
            "the student that learns writes the prefixes; set teacher.cache to a cache that an "
            "older student wrote",
        ),
    )
