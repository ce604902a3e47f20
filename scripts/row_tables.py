"""Tables of the fields of a run's files, read from the source of their schemas."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUNS = Path(__file__).resolve().parent.parent / "src/potstill/runs"
SCHEMAS = (RUNS / "schema.py", RUNS / "results_schema.py")
# The kinds of rows that each file has; a field that was shown above is not shown again.
FILES = {
    "metrics.jsonl": (*("StepMetrics", "Timing", "WriterMeans", "EndHabits", "Flops"),),
    "validation.jsonl": ("ValidationRow",),
    "evals.jsonl": ("RunEvalRow", "ProblemColumns"),
    "samples.jsonl": ("SampleRow",),
    "window.jsonl": ("WindowRow",),
    "plan.json of a study": ("StudyPlan", "PlanPanel", "PlanRun"),
}


@dataclass(frozen=True)
class Group:
    """Fields of one meaning; optional ones are not in every row."""

    names: tuple[str, ...]
    is_optional: bool
    meaning: str


@dataclass(frozen=True)
class Kind:
    """A kind of row: its docstring, the kinds that it extends, and its own fields."""

    about: str
    bases: tuple[str, ...]
    groups: tuple[Group, ...]


def row_tables() -> str:
    """A section for each file, with a table for each kind of row."""
    kinds: dict[str, Kind] = {}
    for file in SCHEMAS:
        kinds |= kinds_in(ast.parse(file.read_text()))
    lines: list[str] = []
    for title, names in FILES.items():
        lines += [f"### {title}", ""]
        shown: set[str] = set()
        for name in names:
            lines += [kinds[name].about, "", "| field | in | meaning |", "|---|---|---|"]
            lines += [
                line_of(group)
                for each in new_kinds(name, kinds, shown)
                for group in kinds[each].groups
            ]
            lines.append("")
    return "\n".join(lines)


def new_kinds(name: str, kinds: dict[str, Kind], shown: set[str]) -> Iterator[str]:
    """A kind and what it extends, its bases first, but for those that were shown."""
    if name not in kinds or name in shown:
        return
    shown.add(name)
    for base in kinds[name].bases:
        yield from new_kinds(base, kinds, shown)
    yield name


def line_of(group: Group) -> str:
    names = ", ".join(f"`{name}`" for name in group.names)
    return f"| {names} | {'some rows' if group.is_optional else 'every row'} | {group.meaning} |"


def kinds_in(module: ast.Module) -> dict[str, Kind]:
    """Every kind of row that a module defines, by name."""
    kinds = {}
    for node, after in zip(module.body, [*module.body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef):
            bases = tuple(base.id for base in node.bases if isinstance(base, ast.Name))
            kinds[node.name] = Kind(one_line(ast.get_docstring(node) or ""), bases, groups_of(node))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            kinds |= by_call(node.value, text_of(after))
    return kinds


def groups_of(node: ast.ClassDef) -> tuple[Group, ...]:
    """The fields of a class, each group up to the docstring below it. Raises ValueError for one
    without."""
    groups, names, optional = [], [], []
    for item in node.body[1:]:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            names.append(item.target.id)
            optional.append(ast.unparse(item.annotation).startswith("NotRequired["))
        elif text := text_of(item):
            if len(set(optional)) != 1:
                raise ValueError(
                    f"{node.name}: {', '.join(names)} are not all in every row; describe them apart"
                )
            groups.append(Group(tuple(names), optional[0], text))
            names, optional = [], []
    if names:
        raise ValueError(f"{node.name}: {', '.join(names)} have no docstring; write one below them")
    return tuple(groups)


def by_call(call: ast.Call, meaning: str) -> dict[str, Kind]:
    """A kind that `TypedDict(name, fields)` makes, as a field whose name is a keyword needs."""
    if not isinstance(call.func, ast.Name) or call.func.id != "TypedDict":
        return {}
    name, fields = call.args
    assert isinstance(fields, ast.Dict)
    names = tuple(ast.literal_eval(key) for key in fields.keys if key is not None)
    return {ast.literal_eval(name): Kind(meaning, (), (Group(names, False, meaning),))}


def text_of(node: ast.AST | None) -> str:
    """The text of a docstring's node; empty for any other node."""
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ):
        return one_line(node.value.value)
    return ""


def one_line(text: str) -> str:
    return " ".join(text.split())
