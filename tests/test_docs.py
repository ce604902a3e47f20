"""The README and the pages of docs/ hold today: what comes from code is current, and every block is
read or run."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import potstill
from potstill.cli import app, usage
from potstill.config import RecipeFields, field_names, load_recipe, make_recipe
from potstill.models.language_model import ASSETS
from potstill.study.file import read_study_file
from potstill.study.planning import plan

ROOT = Path(__file__).parent.parent
# In the order of the navigation, so that later pages find the runs of earlier ones.
NAMES = re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / name for name in NAMES)]
TEXTS = {page.name: page.read_text() for page in PAGES}
each_page = pytest.mark.parametrize("name", TEXTS)

# Commands that the slow test does not run, with the reason.
NOT_RUN = {
    r"^make (?!demo)": "a target that .ci/run or a person calls",
    r"^pip ": "changes the environment of this test",
    r"^lm_eval ": "make test-real does it",
    r"smollm2|models/(student|teacher)|runs/my\b|window\.tokens 32$": "make test-real does it",
    r"math500|--push-to-hub": "asks the hub",
    r"^potstill study paper-mini --jobs": "takes an hour",
}


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[name], re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[str]:
    """The command lines of a page, without comments and continued lines."""
    text = "".join(blocks(name, "sh")).replace("\\\n", " ")
    lines = [shlex.join(shlex.split(line, comments=True)) for line in text.splitlines()]
    return [line for line in lines if line]


def recipe_of(name: str) -> str:
    """The page's first recipe, or the README's."""
    recipes = [block for block in blocks(name, "toml") if "[[panels]]" not in block]
    return (recipes or blocks("README.md", "toml"))[0]


def prepare(folder: Path, recipe: str) -> None:
    """The files that the pages speak of."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "my.toml").write_text(recipe)
    (folder / "prompts.jsonl").write_text(blocks("data.md", "json")[0])


def test_every_page_is_in_the_navigation():
    assert sorted(NAMES) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_what_comes_from_code_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = runpy.run_path(str(ROOT / "scripts" / "write_docs.py"))
    for page in script["pages"]():
        text = page.read_text()
        assert script["rewritten"](text) == text, (
            f"{page.name} is old: run `python scripts/write_docs.py`"
        )


def test_pages_that_must_stay_short_do():
    assert len(TEXTS["results.md"].split()) <= 1500
    assert len(TEXTS["CONTRIBUTING.md"].splitlines()) <= 120
    by_hand = re.sub(
        r"<!-- generated.*?<!-- end -->", "", TEXTS["architecture.md"], flags=re.DOTALL
    )
    assert len(by_hand.splitlines()) <= 150


@each_page
def test_every_block_is_of_a_kind_that_is_checked(name):
    kinds = re.findall(r"^```(.*)$", TEXTS[name], re.MULTILINE)[::2]
    assert set(kinds) <= {"sh", "toml", "python", "json", "text"}


@each_page
def test_names_of_fields_exist(name):
    fields = set(field_names(RecipeFields))
    sections = {field.split(".")[0] for field in fields if "." in field}
    for code in re.findall(r"`([^`\n]+)`", TEXTS[name]):
        section, field = re.fullmatch(r"\[(\w+)\]", code), re.match(r"(\w+)\.(\w+)(?!\.|\w)", code)
        if section and section[1] != "fields":
            assert section[1] in sections, code
        if field and field[1] in sections and field[2] not in ("py", "jsonl"):
            assert field[0] in fields, code


@each_page
def test_recipes_and_studies_are_valid(name, tmp_path):
    for block in blocks(name, "toml"):
        data = tomllib.loads(block)
        if "panels" not in data:
            make_recipe(data)
            continue
        (tmp_path / "study.toml").write_text(block)
        natural, sweep = plan(read_study_file(tmp_path / "study.toml"), {})
        assert (
            len([item for item in natural.items if item.kind == "train"]) == (2 * 4 * 2 + 1 + 2) * 3
        )
        assert len([item for item in sweep.items if item.kind == "train"]) == 4 * 3


@each_page
def test_commands_are_read(name, tmp_path, monkeypatch, capsys):
    """Each by the real parser; what trains also resolves its recipe."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, recipe_of(name))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for line in commands(name):
        program, *arguments = shlex.split(line)
        if program == "torchrun":
            program, arguments = "potstill", arguments[arguments.index("potstill") + 1 :]
        if program == "make":
            assert arguments[0] in targets, line
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), line
        elif program == "pip":
            assert set(re.findall(r"\[(\w+)\]", line)) <= set(extras), line
        elif program == "potstill":
            read(arguments, monkeypatch)
        else:
            assert program == "lm_eval", line
    assert not list(tmp_path.glob("runs*"))


def read(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command, and resolve the recipe or study that it names."""
    if arguments[0] == "train":
        extended = arguments.index("--extend-to") if "--extend-to" in arguments else len(arguments)
        app.main([*arguments[:extended], *([] if "--dry-run" in arguments else ["--dry-run"])])
        return
    if arguments[0] == "study":
        read_study_file(arguments[1])
    with monkeypatch.context() as patch:
        parsed = usage.parse

        def only_parse(*given, **options):
            parsed(*given, **options)
            return lambda: None

        patch.setattr(usage, "parse", only_parse)
        app.main(arguments)


def run_python(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page, one after another, in a folder."""
    monkeypatch.chdir(folder)
    namespace = {"student_folder": ASSETS / "base", "teacher_folder": ASSETS / "teacher"}
    for block in blocks(name, "python"):
        exec(compile(block, name, "exec"), namespace)


has_python = pytest.mark.parametrize("name", [name for name in TEXTS if blocks(name, "python")])


@has_python
def test_python_runs_in_small(name, tmp_path, monkeypatch):
    small = {
        "train.steps": 2,
        "train.prompts_per_step": 4,
        "train.warmup_steps": 0,
        "window.tokens": 8,
    }
    small |= {"data.num_prompts": 16, "evaluation.num_problems": 2, "evaluation.num_responses": 2}

    def load_small(recipe, overrides):
        return load_recipe(recipe, overrides | small)

    monkeypatch.setattr(potstill, "load_recipe", load_small, raising=False)
    run_python(name, tmp_path, monkeypatch)


@pytest.mark.slow
@has_python
def test_python_runs(name, tmp_path, monkeypatch):
    run_python(name, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the pages' commands find what earlier ones made."""
    folder = tmp_path_factory.mktemp("workplace")
    prepare(folder, blocks("README.md", "toml")[0])
    return folder


@pytest.mark.slow
@each_page
def test_commands_run(name, workplace):
    """All pages in one folder and in order: a run that is finished is not repeated."""
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }
    for line in commands(name):
        if any(re.search(pattern, line) for pattern in NOT_RUN):
            continue
        line = line.replace("make demo", "potstill study quick")
        assert shutil.which(shlex.split(line)[0], path=environment["PATH"]), line
        done = subprocess.run(
            shlex.split(line), cwd=workplace, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
