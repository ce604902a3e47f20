"""All fields of a recipe."""

from pathlib import Path
from typing import Annotated, Any

from potstill.config.roles import Place, Role
from potstill.config.section import Section
from potstill.config.sections.data import Data
from potstill.config.sections.engine import EngineSpec
from potstill.config.sections.evaluation import Evaluation
from potstill.config.sections.models import FurtherTeacher, StudentSpec, TeacherSpec
from potstill.config.sections.objective import Objective, Reward, WeightSchedule
from potstill.config.sections.train import Train
from potstill.config.sections.validation import Validation
from potstill.config.sections.window import Window
from potstill.config.sections.writing import Rollouts, Sampling
from potstill.config.weightings import WEIGHTINGS
from potstill.tasks.own import own_task


class RecipeFields(Section):
    """All fields of a recipe, each checked by itself."""

    out: Annotated[Path, Role.OUTPUT, Place.FIRST] = Path("runs/run")
    """Run folder. A run that is already there and unfinished is resumed."""
    student: StudentSpec = StudentSpec()
    teacher: TeacherSpec = TeacherSpec()
    teachers: Annotated[tuple[FurtherTeacher, ...], Role.MODEL] = ()
    """Teachers beside the first one: tables [[teachers]] with `name`, `model`, `weight`, `only`,
    and where they are, as in [teacher]."""
    data: Data = Data()
    objective: Objective = Objective()
    weight_schedule: WeightSchedule = WeightSchedule()
    reward: Reward = Reward()
    sampling: Sampling = Sampling()
    rollouts: Rollouts = Rollouts()
    engine: EngineSpec = EngineSpec()
    window: Window = Window()
    train: Train = Train()
    validation: Validation = Validation()
    evaluation: Evaluation = Evaluation()

    @property
    def draws_exactly(self) -> bool:
        """Whether a student that writes draws from the distribution that the loss is about."""
        drawn = (self.sampling.temperature, self.sampling.top_p, self.sampling.top_k)
        return drawn == (self.objective.temperature, 1.0, 0)

    def writes_in(self, compute_dtype: str) -> str:
        """The type of the weights that write the student's completions, whose passes compute in
        `compute_dtype`. A student with an adapter writes as it is."""
        if self.student.lora.rank is not None or self.student.dtype != "float32":
            return self.student.dtype
        return self.rollouts.dtype or compute_dtype

    @property
    def rewards_tokens(self) -> bool:
        """Whether the gradient is that of drawn tokens' probabilities, at least in part."""
        objective, weights = self.objective, self.objective.weights
        if objective.signal in ("sampled", "spans") or self.reward.weight or objective.gamma:
            return True
        if weights is None:
            return False
        return weights not in WEIGHTINGS or WEIGHTINGS[weights].is_reward

    @property
    def student_writes(self) -> bool:
        """Whether the student writes rollouts in training."""
        return self.objective.prefix in ("student", "mixed") and self.teacher.cache is None

    @property
    def has_older_prefixes(self) -> bool:
        """Whether the prefixes are a student's that wrote them into a cache before."""
        return self.objective.prefix == "student" and self.teacher.cache is not None

    @property
    def own_sources(self) -> tuple[str | tuple[str, ...] | None, ...]:
        """Names of what may be in Python files of the user's own, beside the data."""
        return (self.evaluation.source, self.reward.source, self.objective.weights)

    @property
    def rollouts_per_step(self) -> int:
        """The rollouts of one update, over all ranks."""
        return self.train.prompts_per_step * self.reward.group_size

    @property
    def is_scored(self) -> bool:
        """Whether the responses of a step are scored, for the reward or for what tokens count."""
        weights, reward = self.objective.weights, self.reward
        if reward.weight or weights is None:
            return reward.weight > 0
        if own_task(weights) is not None:
            return reward.group_size > 1 or reward.source is not None
        return weights in WEIGHTINGS and WEIGHTINGS[weights].needs_scores


def run_evaluation(recipe: RecipeFields) -> Evaluation:
    """The evaluation of a run, whose chats are told by default what those of the data are: the
    arguments of the template, and the system prompt."""
    evaluation, data = recipe.evaluation, recipe.data
    told: dict[str, Any] = {
        "template_arguments": evaluation.template_arguments or data.template_arguments
    }
    if evaluation.system is None and evaluation.template == "chat":
        told["system"] = data.system
    return evaluation.model_copy(update=told)
