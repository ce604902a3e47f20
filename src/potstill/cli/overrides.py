"""Overrides of a recipe on the command line: dotted names and values as TOML."""

import tomllib
from typing import Any

from pydantic import BaseModel

from potstill.cli.usage import UsageError
from potstill.config import (
    CacheOptions,
    EngineSpec,
    Evaluation,
    RecipeError,
    RecipeFields,
    field_names,
)
from potstill.console.names import SYNONYMS, nearest, nearest_field

# The recipe that a command takes.
SCHEMAS: dict[str, type[BaseModel]] = {
    "train": RecipeFields,
    "doctor": RecipeFields,
    "plan": RecipeFields,
    "cache build": RecipeFields,
}
# Options of `potstill plan`, some of which are called as fields are elsewhere.
PLAN_OPTIONS = ("devices", "device", "prompt_tokens", "response_tokens")


def split_overrides(command: str, argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--section.field VALUE`, and of the command's recipe `--out` and the like, out of its
    arguments.

    Values are read as TOML would.
    """
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    schema = SCHEMAS.get(command)
    own = {"method", "dry_run", "json", "help", *PLAN_OPTIONS}
    top_level = {name for name in field_names(schema) if "." not in name} if schema else set()
    if command == "cache build":
        # --out is the folder of the cache.
        own, top_level = own | {"out"} | set(CacheOptions.__dataclass_fields__), set()
    i = 0
    while i < len(argv):
        name, equals, value = argv[i].removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argv[i].startswith("--") or not ("." in name or name in top_level):
            if argv[i].startswith("--") and schema is not None and name not in own:
                lead_to_the_field(argv[i], name, schema)
            rest.append(argv[i])
            i += 1
            continue
        values = [value] if equals else []
        i += 1
        while not equals and i < len(argv) and not argv[i].startswith("--"):
            values.append(argv[i])
            i += 1
        if not values:
            raise RecipeError(f"--{name} has no value")
        overrides[name] = (
            _literal(values[0]) if len(values) == 1 else [_literal(value) for value in values]
        )
    return rest, overrides


def lead_to_the_field(flag: str, name: str, schema: type[BaseModel]) -> None:
    """Raise UsageError for a flag that is a section, nearly a field without its section, or what
    other programs call one."""
    names = field_names(schema)
    if inner := [field for field in names if field.startswith(f"{name}.")]:
        raise UsageError(
            f"--{name} is a section of the recipe; name one of its fields, as in --{inner[0]}"
        )
    if name in SYNONYMS or nearest(name, [field.rpartition(".")[2] for field in names], 0.75):
        raise UsageError(
            f"{flag.partition('=')[0]} is no option; the nearest is --{nearest_field(name, names)}"
        )


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    # Also of integers of thousands of digits, and of brackets in brackets.
    except (ValueError, KeyError, RecursionError):
        return text


def server_options(engine: str, overrides: dict[str, Any]) -> EngineSpec | None:
    """The server that writes, from `--engine.FIELD VALUE`, which are taken out of the overrides;
    None for the native engine."""
    fields = [f"engine.{name}" for name in ("python", "args", "url", "timeout")]
    given = {name: overrides.pop(name) for name in fields if name in overrides}
    if engine != "native":
        return EngineSpec(**{name.partition(".")[2]: value for name, value in given.items()})
    if given:
        raise UsageError(f"--{next(iter(given))} is read with --engine vllm alone; give it too")
    return None


def template_arguments(overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments for a chat template from `--template-arguments.NAME VALUE`; other dotted names
    are refused."""
    mine = {name for name in overrides if name.startswith("template_arguments.")}
    refuse_overrides({name: value for name, value in overrides.items() if name not in mine})
    told = {name.partition(".")[2]: overrides[name] for name in sorted(mine)}
    return {"template_arguments": Evaluation(template_arguments=told).template_arguments}


def refuse_overrides(overrides: dict[str, Any]) -> None:
    if overrides:
        takers = ", ".join(f"`potstill {name}`" for name in SCHEMAS)
        raise RecipeError(
            f"--{next(iter(overrides))} is a field of a recipe, which only {takers} take"
        )
