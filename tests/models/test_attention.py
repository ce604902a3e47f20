"""The implementation of attention that a recipe chooses."""

import importlib.util

import pytest
import torch
from conftest import tiny_recipe

import potstill
from potstill.config import Recipe, RecipeError, make_recipe
from potstill.models.distributed import World
from potstill.models.language_model import ModelError, load_model
from potstill.runs import run_folder
from potstill.training.setup import prepare

WORLD = World(0, 1, torch.device("cpu"))


def test_a_run_of_another_implementation_differs_by_rounding(tmp_path):
    rows = []
    for name in ("sdpa", "eager"):
        models = {who: {"attention": name} for who in ("student", "teacher")}
        recipe = tiny_recipe(tmp_path / name, **models)
        setup = prepare(recipe, WORLD)
        both = (setup.student.model, setup.teacher.model)
        assert [model.config._attn_implementation for model in both] == [name, name]
        potstill.train(recipe, quiet=True)
        rows.append(run_folder.read_rows(tmp_path / name / "metrics.jsonl")[0])
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed")
def test_what_is_not_there_is_refused_by_name(tmp_path):
    spec = {"attention": "flash_attention_2"}
    with pytest.raises(ModelError, match=r"16 bits and its weights are float32; set its dtype"):
        potstill.train(tiny_recipe(tmp_path / "run", student=spec), quiet=True)
    with pytest.raises(ModelError, match=r"flash_attention_2' cannot be had .* sdpa or eager"):
        potstill.train(
            tiny_recipe(tmp_path / "run", teacher=spec | {"dtype": "bfloat16"}), quiet=True
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_object_keeps_its_own(tmp_path, who):
    model = load_model(f"potstill:{'base' if who == 'student' else 'teacher'}")
    recipe = tiny_recipe(tmp_path / "run", **{who: {"attention": "eager"}})
    with pytest.raises(ModelError, match="set_attn_implementation"):
        potstill.train(recipe, **{who: model}, quiet=True)


@pytest.mark.parametrize(
    "teacher", [{"model": "self"}, {"url": "http://127.0.0.1:1"}], ids=["self", "elsewhere"]
)
def test_a_teacher_that_is_not_loaded_has_none(teacher):
    with pytest.raises(RecipeError, match=r"teacher\.attention is set but not read"):
        make_recipe({"teacher": teacher | {"attention": "eager"}})
    assert Recipe().teacher.attention is None
