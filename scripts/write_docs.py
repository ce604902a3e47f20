"""Write what the documentation repeats from the code: recipe fields, the rows of a run's files, the
map of modules, and the tree in the README.

`python scripts/write_docs.py` replaces the text between a line `<!-- generated: NAME -->` and the
next `<!-- end -->` in each page. A test compares the pages with what this would write.
"""

import ast
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from row_tables import row_tables

from potstill.config import NOTATION, WEIGHTINGS, RecipeFields
from potstill.config.reference import DescribedField, about_section, described

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
BLOCK = re.compile(
    r"(?<=<!-- generated: )(?P<name>[a-z ]+)(?: -->\n)(?P<text>.*?)(?=<!-- end -->)", re.DOTALL
)


def documented_modules(source: Path = SOURCE) -> dict[Path, str]:
    """The first sentence of each module's docstring, by its path. Raises ValueError where one has
    none."""
    summaries = {}
    for path in sorted(source.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        if not docstring:
            raise ValueError(
                f"{path.relative_to(ROOT)} has no docstring; begin it with a line on what it is for"
            )
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
    rows = {
        str(folder.relative_to(ROOT)): text for folder, text in packages.items() if folder != SOURCE
    }
    rows |= {
        name: text
        for name, text in FOLDERS.items()
        if name.startswith("src/") and (ROOT / name).is_dir()
    }
    inside = [
        (f"  {name.removeprefix('src/potstill/')}/", text) for name, text in sorted(rows.items())
    ]
    outside = [(f"{name}/", text) for name, text in FOLDERS.items() if is_outside(name)]
    lines = [("src/potstill/", "the package"), *inside, *outside]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(["```text", *(f"{name:{width}}{text}" for name, text in lines), "```", ""])


def is_outside(name: str) -> bool:
    """Whether a folder of `FOLDERS` exists beside the package."""
    return not name.startswith("src/") and (ROOT / name).is_dir()


def layers() -> str:
    """The layers that import-linter checks, from the top down; nothing where no such contract
    exists."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    rows = [
        layer
        for contract in contracts
        if contract["type"] == "layers"
        for layer in contract["layers"]
    ]
    if not rows:
        return ""
    lines = ["From the top down; a folder imports only from lines below its own:", ""]
    lines += [f"{i}. {rooms(layer)}" for i, layer in enumerate(rows, start=1)]
    return "\n".join([*lines, ""])


def rooms(layer: str) -> str:
    """One layer's modules, each as code."""
    return ", ".join(f"`{name.strip()}`" for name in re.split(r"[|:]", layer))


def recipe_fields() -> str:
    """Tables of a recipe's fields: those that everyone sets by their whole names, then a section
    for each of its sections."""
    fields = described(RecipeFields)
    lines = [
        "### Fields that everyone sets",
        "",
        *field_table([f for f in fields if f.is_first], with_section=True),
    ]
    rest = [field for field in fields if not field.is_first]
    for section in dict.fromkeys(field.section for field in rest):
        about = about_section(RecipeFields, section)
        lines += [f"### {section or 'Top level'}", "", *([about, ""] if about else [])]
        lines += field_table(
            [field for field in rest if field.section == section], with_section=False
        )
    return "\n".join(lines)


def field_table(fields: Sequence[DescribedField], with_section: bool) -> list[str]:
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        name = field.name if with_section else field.name.rpartition(".")[2]
        default = "–" if field.default is None else f"`{field.default}`"
        lines.append(f"| `{name}` | {cell(field.kind)} | {default} | {cell(field.meaning)} |")
    return [*lines, ""]


def weightings() -> str:
    """A table of the weightings by name, and what its letters stand for."""
    lines = ["| name | arguments | meaning | source |", "|---|---|---|---|"]
    for name, weighting in WEIGHTINGS.items():
        known = [f"`{each} = {value.default:g}`" for each, value in weighting.arguments.items()]
        cells = (f"`{name}`", ", ".join(known), weighting.about, weighting.source)
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join([*lines, "", NOTATION, ""])


def cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table: end tokens as code, bars escaped."""
    with_code = re.sub(r"<\|\w+\|>", r"`\g<0>`", text.replace("||", "‖"))
    return with_code.replace("|", "\\|")


GENERATED = {
    "recipe fields": recipe_fields,
    "weightings": weightings,
    "rows": row_tables,
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
