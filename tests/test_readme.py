"""The README says only what is there."""

import re
import tomllib
from pathlib import Path

from potstill.config import make_recipe
from potstill.planning import plan
from potstill.study_file import read_study_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_map_lists_every_module():
    source = ROOT / "src" / "potstill"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    listed = set(re.findall(r"`([\w/]+\.py)`", README[README.index("## The files") : README.index("## How to add")]))
    assert listed == modules


def test_recipe_and_study_are_valid_and_links_exist(tmp_path):
    recipe, study = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    make_recipe(tomllib.loads(recipe))
    (tmp_path / "study.toml").write_text(study)
    natural, sweep = plan(read_study_file(tmp_path / "study.toml"), {})
    assert len([item for item in natural.items if item.kind == "train"]) == (4 * 2 + 2) * 3
    assert len([item for item in sweep.items if item.kind == "train"]) == 4 * 3
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets
