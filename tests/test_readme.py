"""The README says only what is there."""

import re
from pathlib import Path

from potstill.config import make_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_map_lists_every_module():
    source = ROOT / "src" / "potstill"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    listed = set(re.findall(r"`([\w/]+\.py)`", README[README.index("## The files") : README.index("## How to add")]))
    assert listed == modules


def test_the_recipe_is_valid_and_links_exist():
    import tomllib

    (toml,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    make_recipe(tomllib.loads(toml))
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets
