"""The README is short, and what it points at exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 170
    assert len(README.split()) <= 1200


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#:]+)[^)]*\)|src=\"([^\"]+)\"", README)
    assert len(targets) > 15
    for target in targets:
        assert (ROOT / "".join(target)).exists(), target


def test_the_recipe_has_twelve_lines_and_the_demo_eight():
    recipe, demo = (
        re.search(rf"```{kind}\n(.*?)```", README, re.DOTALL)[1].splitlines()
        for kind in ("toml", "text")
    )
    assert len(recipe) == 12 and len(demo) == 8
