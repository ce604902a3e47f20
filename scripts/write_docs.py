"""Write what the documentation repeats from the code: recipe fields, the map of modules, and the tree in the README.

`python scripts/write_docs.py` replaces the text between a line `<!-- generated: NAME -->` and the next
`<!-- end -->` in each page. A test compares the pages with what this would write.
"""

import ast
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from potstill.config import GrpoFields, RecipeFields, toml_value

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "potstill"

# Folders without a docstring of their own.
FOLDERS = {
    "src/potstill/assets": "shipped models: the demo's pair and those of the constructed settings",
    "src/potstill/recipes": "shipped recipes",
    "src/potstill/studies": "shipped studies",
    "tests": "tests on tiny models",
    "examples": "short programs to start from",
    "benchmarks": "speed and memory, beside other implementations",
    "scripts": "programs that make the shipped models and these pages",
    "docs": "the documentation",
}
BLOCK = re.compile(r"(?<=<!-- generated: )(?P<name>[a-z ]+)(?: -->\n)(?P<text>.*?)(?=<!-- end -->)", re.DOTALL)


def documented_modules(source: Path = SOURCE) -> dict[Path, str]:
    """The first sentence of each module's docstring, by its path. Raises ValueError where one has none."""
    summaries = {}
    for path in sorted(source.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        if not docstring:
            raise ValueError(f"{path.relative_to(ROOT)} has no docstring; begin it with a line on what it is for")
        summaries[path] = first_sentence(docstring)
    return summaries


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, without its full stop."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"\.(?= [A-Z`])", paragraph)[0].removesuffix(".")


def module_map() -> str:
    """A table of modules for each folder of the package."""
    summaries = documented_modules()
    folders = sorted({path.parent for path in summaries})
    lines: list[str] = []
    for folder in folders:
        name = str(folder.relative_to(ROOT))
        lines += [f"### {name}", ""]
        if folder != SOURCE:
            lines += [f"{summaries[folder / '__init__.py']}.", ""]
        lines += ["| module | purpose |", "|---|---|"]
        for path, summary in summaries.items():
            if path.parent == folder and (folder == SOURCE or path.name != "__init__.py"):
                lines.append(f"| `{path.name}` | {cell(summary)} |")
        lines.append("")
    return "\n".join(lines)


def tree() -> str:
    """The folders of the repository, a line each, as a block of text."""
    summaries = documented_modules()
    packages = {path.parent: text for path, text in summaries.items() if path.name == "__init__.py"}
    rows = {str(folder.relative_to(ROOT)): text for folder, text in packages.items() if folder != SOURCE}
    rows |= {name: text for name, text in FOLDERS.items() if name.startswith("src/") and (ROOT / name).is_dir()}
    inside = [(f"  {name.removeprefix('src/potstill/')}/", text) for name, text in sorted(rows.items())]
    outside = [(f"{name}/", text) for name, text in FOLDERS.items() if is_outside(name)]
    lines = [("src/potstill/", "the package"), *inside, *outside]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(["```text", *(f"{name:{width}}{text}" for name, text in lines), "```", ""])


def is_outside(name: str) -> bool:
    """Whether a folder of `FOLDERS` exists beside the package."""
    return not name.startswith("src/") and (ROOT / name).is_dir()


def layers() -> str:
    """The layers that import-linter checks, from the top down; nothing where no such contract exists."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    rows = [layer for contract in contracts if contract["type"] == "layers" for layer in contract["layers"]]
    if not rows:
        return ""
    lines = ["From the top down; a folder imports only from lines below its own:", ""]
    lines += [f"{i}. {rooms(layer)}" for i, layer in enumerate(rows, start=1)]
    return "\n".join([*lines, ""])


def rooms(layer: str) -> str:
    """One layer's modules, each as code."""
    return ", ".join(f"`{name.strip()}`" for name in re.split(r"[|:]", layer))


def recipe_fields() -> str:
    """A section for each section of a distillation's recipe."""
    return sections_of(RecipeFields)


def grpo_fields() -> str:
    """The same for what a GRPO recipe has of its own."""
    return sections_of(GrpoFields, leave_out=frozenset(RecipeFields.model_fields) - {"out"})


def sections_of(schema: type[BaseModel], leave_out: frozenset[str] = frozenset()) -> str:
    """Tables of a schema's fields: those of the top level first, then one for each section."""
    fields = {name: field for name, field in schema.model_fields.items() if name not in leave_out}
    top = {name: field for name, field in fields.items() if not is_section(field)}
    lines = ["### Top level", "", *field_table(top)]
    for name, field in fields.items():
        if is_section(field):
            section = section_of(field)
            about = [inspect.cleandoc(section.__doc__), ""] if section.__doc__ else []
            lines += [f"### {name}", "", *about, *field_table(section.model_fields)]
    return "\n".join(lines)


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def section_of(field: FieldInfo) -> type[BaseModel]:
    """The schema of a field that is a section."""
    assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    return field.annotation


def field_table(fields: dict[str, FieldInfo]) -> list[str]:
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        if not field.description:
            raise ValueError(f"the recipe field {name} has no docstring; write one below it")
        meaning = cell(" ".join(field.description.split()))
        lines.append(f"| `{name}` | {type_of(field)} | {default_of(field)} | {meaning} |")
    return [*lines, ""]


def type_of(field: FieldInfo) -> str:
    """A field's type and the bounds of its values, in words of TOML."""
    limits = []
    for name, sign in BOUNDS:
        limits += [f"{sign} {number(getattr(item, name))}" for item in field.metadata if hasattr(item, name)]
    return cell(", ".join([words_for(field.annotation), *limits]))


def number(value: float) -> str:
    """A bound as a reader wants it: whole numbers with all their digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
WORDS = {int: "integer", float: "number", bool: "boolean", str: "text", Path: "path"}


def words_for(annotation: Any) -> str:
    """The name of a type in a recipe: choices as code, lists by their items."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin = getattr(annotation, "__origin__", None)
    inner = [item for item in get_args(annotation) if item is not type(None) and item is not Ellipsis]
    if str(annotation).startswith("typing.Literal"):
        return ", ".join(f"`{choice}`" for choice in inner)
    if str(annotation).startswith("typing.Annotated"):
        return words_for(inner[0])
    if origin is dict:
        return "table"
    if origin is tuple:
        return "list of " + ", ".join(dict.fromkeys(words_for(item) for item in inner))
    if inner:
        return " or ".join(words_for(item) for item in inner)
    raise ValueError(f"{annotation} has no name in the recipe's documentation; add it to WORDS")


def default_of(field: FieldInfo) -> str:
    """A default as TOML; a dash where the field is absent by default or follows from others."""
    value = field.default
    if value is None or value is PydanticUndefined:
        return "–"
    if isinstance(value, Path):
        value = str(value)
    return f"`{toml_value(plain(value))}`"


def plain(value: Any) -> Any:
    """Tuples as the lists that TOML has."""
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table: end tokens as code, bars escaped."""
    with_code = re.sub(r"<\|\w+\|>", r"`\g<0>`", text.replace("||", "‖"))
    return with_code.replace("|", "\\|")


GENERATED = {
    "recipe fields": recipe_fields,
    "grpo fields": grpo_fields,
    "map": module_map,
    "layers": layers,
    "tree": tree,
}


def rewritten(text: str) -> str:
    """A page with every generated part made again."""

    def again(block: re.Match[str]) -> str:
        return f"{block['name']} -->\n{GENERATED[block['name']]()}"

    return BLOCK.sub(again, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(rewritten(page.read_text()))
