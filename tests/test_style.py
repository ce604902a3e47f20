"""House rules that a parser can check."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import potstill
from potstill.cli.app import COMMANDS

PACKAGE = Path(potstill.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
# A program's start and a command's function have names that users know.
TOLD = {"main", *(command.split()[-1] for command in COMMANDS)}


def definitions(body: list[ast.stmt]) -> Iterator[str]:
    """The names that statements define, inside of `if` too; an import defines none."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.If):
            yield from definitions([*node.body, *node.orelse])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (
                part.id
                for target in targets
                for part in ast.walk(target)
                if isinstance(part, ast.Name)
            )


def test_a_public_name_is_defined_in_one_module():
    modules = defaultdict(set)
    for path, tree in TREES.items():
        for name in definitions(tree.body):
            if not name.startswith("_") and not (
                name in TOLD and path.parent.name in ("potstill", "cli")
            ):
                modules[name].add(str(path.relative_to(PACKAGE)))
    assert {name: sorted(found) for name, found in modules.items() if len(found) > 1} == {}
