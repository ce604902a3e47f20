"""Recipes as TOML: found, read, changed by dotted fields, and written."""

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

from potstill.config.recipe import Recipe
from potstill.config.section import RecipeError, validate
from potstill.console.names import nearest
from potstill.console.printable import printable
from potstill.tasks import is_table

SHIPPED_RECIPES = Path(__file__).parent.parent / "recipes"


def load_recipe(recipe: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a TOML recipe, which tells in its notes what was left out of it; otherwise as
    `read_recipe`."""
    fields = overrides or {}
    data = read_recipe(recipe, fields)
    if "grpo" in data:
        raise RecipeError(
            f"{recipe} has a section [grpo], which is no recipe's; reinforcement learning is "
            "`potstill train rl --student.model RUN_OR_FOLDER`, with a section [reward]"
        )
    loaded = make_recipe(data, str(recipe))
    if names := left_out(recipe, fields):
        loaded._notes = (
            f"of the shipped recipe {recipe}, not taken for another model, data or length: "
            f"{', '.join(names)}; --{names[0]} chooses",
        )
    return loaded


def read_recipe(recipe: str | Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a TOML recipe, apply dotted overrides such as {"objective.kl": "reverse"}, as plain
    data.

    `recipe` is a file, or the name of a shipped recipe such as "demo", without what is `left_out`
    of it. Raises RecipeError with one line for a missing file or broken TOML.
    """
    fields = overrides or {}
    data = read_toml(find_toml("recipe", recipe, SHIPPED_RECIPES))
    for name in left_out(recipe, fields):
        section, _, field = name.partition(".")
        del data[section][field]
    return with_fields(data, fields)


def left_out(recipe: str | Path, fields: dict[str, Any]) -> list[str]:
    """The fields of a shipped recipe that hold for its own model, data and length, where `fields`
    name others.

    The learning rate of a model of 75,000 weights would wreck a real one, and 8192 prompts are not
    in every file.
    """
    path = find_toml("recipe", recipe, SHIPPED_RECIPES)
    if path.parent != SHIPPED_RECIPES:
        return []
    data = read_toml(path)
    own_model, own_source = data["student"]["model"], data["data"]["source"]
    model = _first_model(str(fields.get("student.model", own_model)))
    source = fields.get("data.source", own_source)
    has_sources = "data.sources" in fields
    steps = fields.get("train.steps")
    is_short = isinstance(steps, int) and steps < data.get("train", {}).get("warmup_steps", 0)
    is_other_model = model != own_model and not model.startswith("potstill:")
    is_other = {
        "train.lr": is_other_model,
        "data.source": has_sources,
        "data.num_prompts": has_sources or (source != own_source and is_table(source)),
        "train.warmup_steps": is_short,
    }
    sections = [name.split(".") for name, is_so in is_other.items() if is_so and name not in fields]
    return [f"{section}.{field}" for section, field in sections if field in data.get(section, {})]


def _first_model(model: str) -> str:
    """The model that a chain of runs began with; a model of no run is itself."""
    for _ in range(100):  # A recipe that names its own run would go round for ever.
        files = [folder / "recipe.toml" for folder in (Path(model), Path(model).parent)]
        file = next((file for file in files if file.is_file()), None)
        if model.startswith("potstill:") or file is None:
            break
        model = str(read_toml(file).get("student", {}).get("model", "potstill:base"))
    return model


def find_toml(what: str, name: str | Path, shipped: Path) -> Path:
    """A file, or the one of that name in a folder of shipped ones. Raises RecipeError where there
    is none."""
    if Path(name).is_file():
        return Path(name)
    known = sorted(path.stem for path in shipped.glob("*.toml"))
    if str(name) not in known:
        what = f"{what} {str(name)!r}" + (
            " is a folder" if Path(name).is_dir() else " does not exist"
        )
        here = [path.name for path in Path().glob("*.toml")]
        near = nearest(str(name), here, 0.7)
        hint = f"; the nearest is {near!r}" if near else ""
        raise RecipeError(f"{what}{hint}; give a TOML file or one of {', '.join(known)}")
    return shipped / f"{name}.toml"


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain data. Raises RecipeError where it is none."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except RecursionError:
        raise RecipeError(f"{path} is not valid TOML: it is nested too deeply") from None
    # tomllib's own errors are ValueErrors, and an integer of thousands of digits is one that it
    # does not wrap.
    except ValueError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}; give a TOML file that can"
        ) from None


def with_fields(data: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain data with dotted fields set over it."""
    data = copy.deepcopy(data)
    for name, value in fields.items():
        *sections, field = name.split(".")
        section = data
        for key in sections:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise RecipeError(f"{name}: {key} is a value, not a section of the recipe")
        section[field] = value
    return data


def make_recipe(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate the plain data of a recipe; errors as `validate`."""
    return validate(data, where, Recipe)


def to_toml(data: dict[str, Any]) -> str:
    """The resolved recipe as TOML: plain values first, then one table a section."""
    lines = [
        f"{key} = {toml_value(value)}" for key, value in data.items() if not isinstance(value, dict)
    ]
    for key, value in data.items():
        if isinstance(value, dict):
            lines += [
                "",
                f"[{key}]",
                *(f"{name} = {toml_value(item)}" for name, item in value.items()),
            ]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # JSON's strings, numbers and booleans are also TOML.
    return printable(json.dumps(value, ensure_ascii=False))
