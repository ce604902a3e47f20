"""Objects from Python in place of names: models, chats as prompts, sections."""

import pytest
import torch
from conftest import make_model, tiny_recipe
from odd_models import make_tiny, make_tokenizer
from small_runs import rows_of

import potstill
from potstill.runs import run_folder
from potstill.types import DataError

CHAT = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ONE_STEP = {
    "objective": {"prefix": "student", "kl": "reverse"},
    "window": {"tokens": 6},
    "train": {"steps": 1, "prompts_per_step": 2},
}


def test_names_are_as_in_the_recipe(tmp_path):
    models = {"student": "potstill:columns-tiny", "teacher": "potstill:columns-teacher"}
    given = tiny_recipe(tmp_path / "given", **ONE_STEP)
    by_name = potstill.train(given, **models, quiet=True)
    sections = {role: {"model": name} for role, name in models.items()}
    recipe = tiny_recipe(tmp_path / "named", **ONE_STEP, **sections)
    potstill.train(recipe, quiet=True)
    assert rows_of(tmp_path / "given") == rows_of(tmp_path / "named")
    stored = potstill.load_recipe(by_name.folder / "recipe.toml")
    assert stored.hash() == recipe.hash() and given.student.model == "potstill:base"
    assert run_folder.is_done(tmp_path / "given", recipe)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_one_object_in_both_roles_is_copied(tmp_path, is_wrapped):
    """As a model that teaches itself: nothing to learn in the first step, something in the next."""
    loaded = make_model(seed=0)
    before = {name: weight.clone() for name, weight in loaded.model.named_parameters()}
    sections = ONE_STEP | {"train": {"steps": 3, "prompts_per_step": 2, "weight_decay": 0.1}}
    given = {
        "student": loaded if is_wrapped else loaded.model,
        "teacher": loaded.model,
        "tokenizer": loaded.tokenizer,
    }
    result = potstill.train(
        tiny_recipe(tmp_path / "run", **sections), **given, prompts=["12*3="], quiet=True
    )
    first, _, last = rows_of(tmp_path / "run")
    assert abs(first["reverse_kl"]) < 1e-6 < last["reverse_kl"]
    assert result.student.model is loaded.model
    assert any(not torch.equal(w, before[name]) for name, w in loaded.model.named_parameters())
    assert all(weight.requires_grad for weight in loaded.model.parameters())


def test_models_that_share_a_weight_do_not_change_together(tmp_path):
    student, teacher = make_model(seed=0), make_model(seed=1)
    teacher.model.model.norm.weight = student.model.model.norm.weight
    before = teacher.model.model.embed_tokens.weight.clone()
    sections = ONE_STEP | {"train": {"steps": 2, "prompts_per_step": 2}}
    given = {"student": student, "teacher": teacher, "prompts": ["12*3="]}
    potstill.train(tiny_recipe(tmp_path / "run", **sections), **given, quiet=True)
    assert torch.equal(teacher.model.model.embed_tokens.weight, before)
    assert all(weight.requires_grad for weight in student.model.parameters())


def test_a_teacher_is_left_as_it_was(tmp_path):
    teacher = make_model(seed=1)
    teacher.model.lm_head.weight.requires_grad_(False)
    teacher.train()
    expected = [weight.requires_grad for weight in teacher.parameters()]
    given = {"student": make_model(seed=0), "teacher": teacher, "prompts": ["12*3="]}
    potstill.train(tiny_recipe(tmp_path / "run", **ONE_STEP), **given, quiet=True)
    assert [weight.requires_grad for weight in teacher.parameters()] == expected
    assert teacher.training
    given["prompts"] = []
    with pytest.raises(DataError, match="empty"):
        potstill.train(tiny_recipe(tmp_path / "bad", **ONE_STEP), **given, quiet=True)
    assert [weight.requires_grad for weight in teacher.parameters()] == expected


def test_lists_of_messages_are_prompts(tmp_path):
    tok = make_tokenizer()
    tok.chat_template = CHAT
    given = {"student": make_tiny(tok), "teacher": make_tiny(tok, seed=1), "tokenizer": tok}
    chat = [{"role": "user", "content": "one file"}]
    recipe = tiny_recipe(tmp_path / "run", **ONE_STEP)
    potstill.train(recipe, **given, prompts=[chat, "The"], quiet=True)
    prompts = {row["prompt"] for row in run_folder.read_rows(tmp_path / "run/samples.jsonl")}
    assert any("user: one fileassistant: " in prompt for prompt in prompts)
    with pytest.raises(DataError, match=r"prompts\[0\] is one message.*give \[\[message"):
        potstill.train(tiny_recipe(tmp_path / "flat", **ONE_STEP), **given, prompts=chat)


def test_sections_are_public_and_make_the_recipe_that_tables_make(tmp_path):
    recipe = potstill.Recipe(
        out=tmp_path / "run",
        student=potstill.StudentSpec(model="a"),
        teacher=potstill.TeacherSpec(model="b"),
        teachers=(potstill.FurtherTeacher(name="c", model="d"),),
        data=potstill.Data(source="multiplication"),
        objective=potstill.Objective(prefix="student", kl="mixed"),
        weight_schedule=potstill.WeightSchedule(schedule="linear"),
        reward=potstill.Reward(start_kl=0.1),
        sampling=potstill.Sampling(temperature=0.9),
        rollouts=potstill.Rollouts(reuse=2, engine="vllm"),
        engine=potstill.EngineSpec(timeout=9.0),
        window=potstill.Window(tokens=16),
        train=potstill.Train(steps=2),
        validation=potstill.Validation(num_prompts=0),
        evaluation=potstill.Evaluation(source="multiplication"),
    )
    tables = {
        "out": tmp_path / "run",
        "student": {"model": "a"},
        "teacher": {"model": "b"},
        "teachers": [{"name": "c", "model": "d"}],
        "data": {"source": "multiplication"},
        "objective": {"prefix": "student", "kl": "mixed"},
        "weight_schedule": {"schedule": "linear"},
        "reward": {"start_kl": 0.1},
        "sampling": {"temperature": 0.9},
        "rollouts": {"reuse": 2, "engine": "vllm"},
        "engine": {"timeout": 9.0},
        "window": {"tokens": 16},
        "train": {"steps": 2},
        "validation": {"num_prompts": 0},
        "evaluation": {"source": "multiplication"},
    }
    assert recipe.hash() == potstill.Recipe.model_validate(tables).hash()
    sections = {name for name in potstill.Recipe.model_fields if name != "out"}
    assert sections | {"out"} == tables.keys()
    made = [getattr(recipe, name) for name in sections - {"teachers"}]
    assert {type(each).__name__ for each in (*made, *recipe.teachers)} <= {*potstill.__all__}
