"""The recipe: one frozen schema for everything a run does, read from a TOML file plus dotted
overrides."""

from potstill.config.fields import RecipeFields, run_evaluation
from potstill.config.methods import METHODS, Method
from potstill.config.recipe import Recipe, check_recipe, dotted, fields_with, role_of
from potstill.config.roles import ALIKE, CHANGE_NOTHING, CHANGE_ROUNDING, NAMED, Role, Selection
from potstill.config.section import RecipeError, Section, field_names, roles_of, validate
from potstill.config.sections.cache import CacheOptions
from potstill.config.sections.data import Data, DataSource
from potstill.config.sections.engine import EngineSpec
from potstill.config.sections.evaluation import Evaluation
from potstill.config.sections.models import (
    FurtherTeacher,
    Lora,
    StudentSpec,
    TeacherModel,
    TeacherSpec,
)
from potstill.config.sections.objective import Objective, Reward, WeightSchedule
from potstill.config.sections.train import Train
from potstill.config.sections.validation import (
    DEFAULT_PROMPTS,
    HIGHER_IS_BETTER,
    PART,
    WITHOUT_TEACHER,
    Goal,
    Validation,
    steps_between,
)
from potstill.config.sections.window import Window
from potstill.config.sections.writing import Rollouts, Sampling
from potstill.config.toml import (
    SHIPPED_RECIPES,
    find_toml,
    left_out,
    load_recipe,
    make_recipe,
    read_recipe,
    read_toml,
    to_toml,
    toml_value,
    with_fields,
)
from potstill.config.unread import unread_fields
from potstill.config.weightings import NOTATION, WEIGHTINGS, Weighting

__all__ = [
    "ALIKE",
    "CHANGE_NOTHING",
    "CHANGE_ROUNDING",
    "DEFAULT_PROMPTS",
    "HIGHER_IS_BETTER",
    "METHODS",
    "NAMED",
    "NOTATION",
    "PART",
    "SHIPPED_RECIPES",
    "WEIGHTINGS",
    "WITHOUT_TEACHER",
    "CacheOptions",
    "Data",
    "DataSource",
    "EngineSpec",
    "Evaluation",
    "FurtherTeacher",
    "Goal",
    "Lora",
    "Method",
    "Objective",
    "Recipe",
    "RecipeError",
    "RecipeFields",
    "Reward",
    "Role",
    "Rollouts",
    "Sampling",
    "Section",
    "Selection",
    "StudentSpec",
    "TeacherModel",
    "TeacherSpec",
    "Train",
    "Validation",
    "WeightSchedule",
    "Weighting",
    "Window",
    "check_recipe",
    "dotted",
    "field_names",
    "fields_with",
    "find_toml",
    "left_out",
    "load_recipe",
    "make_recipe",
    "read_recipe",
    "read_toml",
    "role_of",
    "roles_of",
    "run_evaluation",
    "steps_between",
    "to_toml",
    "toml_value",
    "unread_fields",
    "validate",
    "with_fields",
]
