"""House rules that a parser can check."""

import ast
import io
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import potstill
from potstill.cli.app import COMMANDS

PACKAGE = Path(potstill.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
# A program's start and a command's function have names that users know.
TOLD = {"main", *(command.split()[-1] for command in COMMANDS)}
# A text that begins so has no head: the reader learns only later what it is about.
HEADLESS = {"What", "Of"}
# Dataclasses of so many fields take them by keyword.
MANY_FIELDS = 4


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


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Every string that stands as a statement, those below the fields of a class included."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value.value


def comments(text: str) -> Iterator[str]:
    """The first line of each comment."""
    last_row = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, is_alone = token.start[0], token.line.lstrip().startswith("#")
            if not is_alone or row != last_row + 1:
                yield token.string.lstrip("# ")
            last_row = row if is_alone else 0


def test_docstrings_and_comments_begin_with_what_they_are_about():
    headless = []
    for path, tree in TREES.items():
        texts = [*docstrings(tree), *comments(path.read_text())]
        firsts = [(text.split() or [""])[0] for text in texts]
        found = [text for text, first in zip(texts, firsts, strict=True) if first in HEADLESS]
        headless += [f"{path.relative_to(PACKAGE)}: {text}" for text in found]
    assert headless == []


def test_a_dataclass_of_many_fields_takes_them_by_keyword():
    """All of them by `kw_only`, or those after a mark of type KW_ONLY."""
    positional = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            how = [ast.unparse(each) for each in getattr(node, "decorator_list", ())]
            if isinstance(node, ast.ClassDef) and any(each.startswith("dataclass") for each in how):
                fields = [
                    ast.unparse(each.annotation)
                    for each in node.body
                    if isinstance(each, ast.AnnAssign)
                ]
                is_by_keyword = any("kw_only=True" in each for each in how) or "KW_ONLY" in fields
                if len(fields) >= MANY_FIELDS and not is_by_keyword:
                    positional.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert positional == []


def test_files_and_folders_are_small():
    """A file has at most 400 lines, and a folder at most 14 modules beside its `__init__`."""
    assert [str(f) for f in TREES if len(f.read_text().splitlines()) > 400] == []
    folders = Counter(f.parent for f in TREES if f.name != "__init__.py")
    assert [str(folder) for folder, number in folders.items() if number > 14] == []
