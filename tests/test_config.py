import tomllib

import pytest
from conftest import tiny_recipe

from potstill.config import (
    METHODS,
    SHIPPED_RECIPES,
    Recipe,
    RecipeError,
    field_names,
    load_recipe,
    make_recipe,
    to_toml,
    unread_fields,
)


def test_every_shipped_recipe_is_valid():
    assets = (path.stem for path in SHIPPED_RECIPES.glob("assets-*.toml"))
    for name in ("demo", "smollm2", *assets):
        assert load_recipe(name).train.steps > 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"objective": {"prefx": "student"}},
            r"objective.prefx is not a field of the recipe; the nearest is objective.prefix$",
        ),
        ({"obective": {"kl": "reverse"}}, r"obective is not a field of the recipe; the nearest is objective"),
        ({"train": {"steps": "many"}}, r"train.steps is 'many': input should be a valid integer"),
        ({"train": {"steps": 0}}, r"train.steps is 0: input should be greater than or equal to 1"),
        ({"train": {"lr": float("inf")}}, r"train.lr is inf"),
        (
            {"objective": {"kl": "jsdd"}},
            r"objective.kl is 'jsdd': input should be 'forward', 'reverse', 'mixed', 'jsd'",
        ),
        (
            {"objective": {"forward_weight": 0.3}},
            r'objective.forward_weight is set but not read: objective.kl is "forward"',
        ),
        (
            {"objective": {"signal": "labels", "prefix": "student"}},
            "on student prefixes has zero expected gradient",
        ),
        ({"objective": {"signal": "labels", "kl": "reverse"}}, r"objective.kl is set but not read"),
        (
            {"objective": {"prefix": "dataset", "signal": "labels"}, "teacher": {"model": "x/y"}},
            r"teacher.model is set but not",
        ),
        ({"objective": {"prefix": "dataset"}, "sampling": {"top_p": 0.9}}, r"sampling.top_p is set but not read"),
        (
            {"objective": {"prefix": "dataset"}, "rollouts": {"end_set": "student"}},
            r"rollouts.end_set is set but not read",
        ),
        (
            {"teacher": {"model": "self"}, "rollouts": {"end_set": "student"}},
            r'rollouts.end_set is set but not read: teacher.model is "self", which ends as the student does',
        ),
        ({"rollouts": {"end_set": "teacher"}}, r"rollouts.end_set is 'teacher': input should be 'union' or 'student'"),
        (
            {"evaluation": {"num_problems": 9}},
            r"evaluation.num_problems is set but not read: evaluation.source is not set",
        ),
        ({"data": {"prompt_column": "question"}}, r"data.prompt_column is set but not read"),
        ({"data": {"source": "a.jsonl", "split": "test"}}, r"data.split is set but not read"),
        ({"train": {"steps": 5, "warmup_steps": 6}}, r"train.warmup_steps is 6, more than train.steps = 5"),
    ],
)
def test_bad_recipes_get_one_line(data, message):
    with pytest.raises(RecipeError, match=message) as error:
        make_recipe(data)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(RecipeError, match=r"'none.toml' does not exist; give a TOML file or one of .*demo"):
        load_recipe("none.toml")
    (tmp_path / "broken.toml").write_text("[train\nsteps = 3")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(tmp_path / "broken.toml")


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "r.toml").write_text('[objective]\nprefix = "teacher"\nkl = "forward"\n')
    recipe = load_recipe(
        tmp_path / "r.toml", {"objective.kl": "mixed", "objective.forward_weight": 0.2, "out": "runs/a"}
    )
    assert (recipe.objective.prefix, recipe.objective.kl, recipe.objective.forward_weight) == ("teacher", "mixed", 0.2)
    assert str(recipe.out) == "runs/a"
    with pytest.raises(RecipeError, match="out is a value, not a section"):
        load_recipe(tmp_path / "r.toml", {"out": "x", "out.b": 1})


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"objective": {"kl": "mixed", "forward_weight": 0.8}},
        {"objective": {"prefix": "dataset", "signal": "labels"}, "data": {"source": "multiplication:persona"}},
        {"evaluation": {"source": "multiplication", "temperatures": (1.0,)}},
        {"data": {"source": 'odd "name".jsonl', "num_prompts": 3}},
    ],
)
def test_a_resolved_recipe_reads_back_as_itself(tmp_path, sections):
    recipe = tiny_recipe(tmp_path, **sections)
    again = make_recipe(tomllib.loads(to_toml(recipe.resolved())))
    assert again.resolved() == recipe.resolved()
    assert again.hash() == recipe.hash()


def test_the_hash_names_the_run_and_not_the_folder(tmp_path):
    assert tiny_recipe("a").hash() == tiny_recipe("b").hash()
    assert tiny_recipe("a").hash() != tiny_recipe("a", train={"seed": 1}).hash()
    # A default that is written out is the same run.
    assert tiny_recipe("a").hash() == tiny_recipe("a", objective={"temperature": 1.0}).hash()


def test_unread_fields_exist():
    for data in ({"objective": {"prefix": "dataset", "signal": "labels"}}, {"data": {"source": "x.jsonl"}}, {}):
        for name in unread_fields(Recipe.model_validate(data)):
            assert any(known == name or known.startswith(name + ".") for known in field_names()), name


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().train.steps = 3


def test_the_four_corners_have_their_names():
    for method in METHODS.values():
        recipe = make_recipe({"objective": {"prefix": method.prefix, "kl": method.kl}})
        assert recipe.method == method.name
    for objective, name in [
        ({"kl": "mixed", "forward_weight": 0.8}, "Hybrid(teacher / 0.8 forward + 0.2 reverse)"),
        (
            {"kl": "mixed", "forward_weight": 0.25, "forward_above": 1.5, "prefix": "student"},
            "Hybrid(student / 0.25 forward + 0.75 reverse above 1.5 nats)",
        ),
        ({"prefix": "mixed", "student_share": 0.3}, "Hybrid(0.3 student by sequence / forward)"),
        ({"prefix": "mixed", "mix_unit": "handoff"}, "Hybrid(teacher first for 8-64 tokens / forward)"),
        ({"kl": "jsd"}, "Hybrid(teacher / jsd 0.5)"),
        ({"kl": "skew-reverse", "signal": "topk"}, "Hybrid(teacher / skew-reverse 0.1; top 64)"),
        ({"prefix": "student", "kl": "reverse", "gamma": 1}, "OPD (gamma 1)"),
        ({"split": 16, "split_weights": [1, 0.5]}, "SFT (split at 16: 1, 0.5)"),
        ({"signal": "labels"}, "Hard-label SFT (teacher prefix)"),
    ]:
        assert make_recipe({"objective": objective}).objective.name == name


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"prefix": "teacher", "kl": "reverse"}}, "means over tokens that the student drew"),
        ({"objective": {"prefix": "student", "kl": "forward"}}, "'k1' has the gradient of the reverse KL"),
        (
            {"objective": {"prefix": "student", "kl": "reverse", "estimator": "k3"}},
            "'k3' has the gradient",
        ),
        ({"objective": {"prefix": "student", "kl": "mixed"}}, "'k1' has the gradient of the reverse KL"),
        (
            {"objective": {"prefix": "student", "kl": "reverse"}, "sampling": {"top_k": 5}},
            "drawn exactly from",
        ),
        ({"objective": {"prefix": "student", "kl": "reverse", "temperature": 2.0}}, "set sampling.temperature to it"),
        ({"objective": {"prefix": "student", "kl": "reverse"}, "rollouts": {"reuse": 2}}, "no longer is who drew"),
        (
            {"objective": {"prefix": "student", "kl": "reverse", "estimator": "k2", "baseline": "exact"}},
            "baseline is set but not read",
        ),
    ],
)
def test_sampled_signals_with_another_gradient_are_refused(sections, message):
    sections["objective"]["signal"] = "sampled"
    with pytest.raises(RecipeError, match=message):
        make_recipe(sections)
    with pytest.raises(RecipeError, match="estimator is set but not read"):
        make_recipe({"objective": {"estimator": "k1"}})
