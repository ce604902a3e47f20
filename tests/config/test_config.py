import runpy
import tomllib
from pathlib import Path
from typing import Annotated

import pytest
from conftest import tiny_recipe

from potstill.config import (
    ALIKE,
    METHODS,
    NAMED,
    SHIPPED_RECIPES,
    Evaluation,
    Objective,
    Recipe,
    RecipeError,
    Role,
    Sampling,
    Section,
    Train,
    Validation,
    field_names,
    fields_with,
    left_out,
    load_recipe,
    make_recipe,
    read_recipe,
    role_of,
    roles_of,
    to_toml,
    unread_fields,
)
from potstill.console.names import SYNONYMS, nearest_field
from potstill.report.questions import QUESTIONS
from potstill.runs.results import read_entry
from potstill.study.estimates import FREE
from potstill.study.file import SHIPPED_STUDIES, read_study_file
from potstill.study.planning import plan
from potstill.training.rates import usual_lr, with_lr

ASSET_RECIPES = Path(__file__).parents[2] / "scripts" / "asset_recipes"


def test_every_shipped_model_has_a_recipe_that_makes_it():
    names = {path.stem for path in ASSET_RECIPES.glob("*.toml")}
    assert (
        names == runpy.run_path(str(ASSET_RECIPES.parent / "make_assets.py"))["BLUEPRINTS"].keys()
    )
    for name in names:
        recipe = load_recipe(ASSET_RECIPES / f"{name}.toml")
        assert (recipe.out, recipe.student.model) == (
            Path("build/assets") / name,
            f"build/assets/{name}-blueprint",
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"objective": {"prefx": "student"}},
            r"objective.prefx is not a field of the recipe; the nearest is objective.prefix$",
        ),
        (
            {"obective": {"kl": "reverse"}},
            r"obective is not a field of the recipe; the nearest is objective",
        ),
        ({"train": {"steps": "many"}}, r"train.steps is 'many': input should be a valid integer"),
        ({"train": {"steps": 0}}, r"train.steps is 0: input should be greater than or equal to 1"),
        ({"train": {"lr": float("inf")}}, r"train.lr is inf"),
        (
            {"objective": {"kl": "jsdd"}},
            r"objective.kl is 'jsdd': the nearest is 'jsd'; input should be 'forward', 'reverse'",
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
        (
            {"objective": {"prefix": "dataset"}, "sampling": {"top_p": 0.9}},
            r"sampling.top_p is set but not read",
        ),
        (
            {"objective": {"prefix": "dataset"}, "rollouts": {"end_set": "student"}},
            r"rollouts.end_set is set but not read",
        ),
        (
            {"teacher": {"model": "self"}, "rollouts": {"end_set": "student"}},
            r'rollouts.end_set is set but not read: teacher.model is "self", which ends as the '
            r"student does",
        ),
        (
            {"rollouts": {"end_set": "teacher"}},
            r"rollouts.end_set is 'teacher': input should be 'union' or 'student'",
        ),
        *[
            ({"evaluation": {"source": "multiplication", **settings}}, message)
            for settings, message in [
                (
                    {"temperatures": []},
                    r"temperatures is \[\]: it is empty; name at least one",
                ),
                (
                    {"temperatures": [-1]},
                    r"evaluation.temperatures.0 is -1: it must be 0, which is greedy, or at least",
                ),
                ({"temperatures": [1, 1e-30]}, r"evaluation.temperatures.1 is 1e-30: it must be 0"),
                (
                    {"temperatures": [1, 0.6, 1.0]},
                    r"evaluation.temperatures is .*; give each temperature once",
                ),
                (
                    {"num_problems": 10**6, "num_responses": 10**6},
                    r"is 1000000000000, and 10000000 responses are the",
                ),
            ]
        ],
        (
            {"sampling": {"temperature": 1e-30}},
            r"sampling.temperature is 1e-30: it must be 0, which is greedy, or",
        ),
        (
            {"evaluation": {"num_problems": 9}},
            r"evaluation.num_problems is set but not read: evaluation.source is not set",
        ),
        ({"data": {"prompt_column": "question"}}, r"data.prompt_column is set but not read"),
        ({"data": {"source": "a.jsonl", "split": "test"}}, r"data.split is set but not read"),
        (
            {"train": {"steps": 5, "warmup_steps": 6}},
            r"train.warmup_steps is 6, more than train.steps = 5",
        ),
        ({"train": {"steps": True}}, r"train.steps is True: input should be a valid integer"),
        ({"train": {"steps": "2"}}, r"train.steps is '2': input should be a valid integer"),
        ({"train": {"lr": "1e-3"}}, r"train.lr is '1e-3': input should be a valid number"),
        (
            {"train": {"betas": [0.9, True]}},
            r"train.betas is \[0.9, True\]: input should be a valid number",
        ),
        (
            {"weight_schedule": {"at_steps": [["1", 0.5]]}},
            r"weight_schedule.at_steps is .*: input should be a valid integer",
        ),
        (
            {"student": {"trust_remote_code": 1}},
            r"trust_remote_code is 1: input should be a valid boolean",
        ),
        (
            {"student": {"trust_remote_code": "yes"}},
            r"trust_remote_code is 'yes': input should be a valid boolean",
        ),
        (
            {"train": {"steps": 2**63}},
            r"train.steps is 9223372036854775808: .* less than or equal to 1000000000",
        ),
        (
            {"train": {"prompts_per_step": 10**9}},
            r"prompts_per_step is 1000000000: .* less than or equal to 1000000",
        ),
        (
            {"data": {"num_prompts": 10**12}},
            r"num_prompts is 1000000000000: .* less than or equal to",
        ),
        ({"train": {"steps": 10**5000}}, r"train.steps is a number of thousands of digits"),
        *(
            (
                {section: {"seed": -1}},
                rf"{section}.seed is -1: input should be greater than or equal to 0",
            )
            for section in ("train", "data", "evaluation")
        ),
        ({"train": {"betas": [0.9, 1.0]}}, r"train.betas.1 is 1.0: input should be less than 1"),
        (
            {"train": {"betas": [-0.1, 0.9]}},
            r"train.betas.0 is -0.1: input should be greater than or equal to 0",
        ),
        (
            {
                "objective": {
                    "weights": "split",
                    "weights_arguments": {"at": 2, "before": 0, "after": 0},
                }
            },
            r"before = 0 and after = 0: no token has a weight",
        ),
        (
            {"objective": {"temperature": 1e-30}},
            r"objective.temperature is 1e-30: .* greater than or equal to 0.0001",
        ),
        ({"train": 3}, r"train is 3: it is a section; write its fields below a line \[train\]"),
        (
            {"out": "x" * 300 + "\0", "train": {"steps": "x" * 1000}},
            r"train.steps is 'x{99}\.\.\.: input should",
        ),
    ],
)
def test_bad_recipes_get_one_line(data, message):
    with pytest.raises(RecipeError, match=message) as error:
        make_recipe(data)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(
        RecipeError, match=r"'none.toml' does not exist; give a TOML file or one of .*demo"
    ):
        load_recipe("none.toml")
    (tmp_path / "broken.toml").write_text("[train\nsteps = 3")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(tmp_path / "broken.toml")
    with pytest.raises(
        RecipeError,
        match=r"is a folder; give a TOML file or one of demo, opsd, qwen3, rl, sdft, smollm2$",
    ):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out = 'é'".encode("latin-1"), "is no UTF-8 text"),
        ("out = 'a'".encode("utf-16"), "is no UTF-8 text"),
        (bytes(range(256)), "is no UTF-8 text"),
        (b"out = 'a\0b'", "is not valid TOML"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "is nested too deeply"),
        (b"[train]\nsteps = " + b"9" * 10_000, "is not valid TOML: Exceeds the limit"),
    ],
)
def test_files_that_are_no_text(tmp_path, text, message):
    (tmp_path / "r.toml").write_bytes(text)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(tmp_path / "r.toml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", [Recipe, Train, Evaluation, Sampling])
def test_sections_made_in_python_are_refused_in_one_line(section):
    with pytest.raises(
        RecipeError, match=r"otu is not a field of the recipe; the nearest is "
    ) as error:
        section(otu=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("train.learning_rate", "train.lr"),
        ("learning_rate", "train.lr"),
        ("lr", "train.lr"),
        ("train.batch_size", "train.prompts_per_step"),
        ("train.gradient_accumulation_steps", "train.tokens_per_batch"),
        ("train.num_epochs", "train.steps"),
        ("epochs", "train.steps"),
        ("max_steps", "train.steps"),
        ("train.seeds", "train.seed"),
        ("seed", "train.seed"),
        ("evaluation.seeed", "evaluation.seed"),
        ("max_length", "window.tokens"),
        ("max_new_tokens", "window.tokens"),
        ("evaluation.max_new_tokens", "evaluation.max_tokens"),
        ("evaluation.temperature", "evaluation.temperatures"),
        ("objective.beta", "objective.forward_weight"),
        ("reward.beta", "reward.start_kl"),
        ("reward.kl_coef", "reward.start_kl"),
        ("num_generations", "reward.group_size"),
        ("train.num_iterations", "rollouts.reuse"),
        ("alpha", "objective.forward_weight"),
        ("lmbda", "objective.student_share"),
        ("model", "student.model"),
        ("teacher_model", "teacher.model"),
        ("output_dir", "out"),
        ("data.dataset", "data.source"),
        ("obective", "objective"),
        ("traim", "train"),
        ("objective.prefx", "objective.prefix"),
        ("train.tokens", "window.tokens"),
        ("zzz", None),
    ],
)
def test_names_of_other_programs_lead_to_the_field(name, field):
    found = nearest_field(name, field_names(Recipe))
    assert found == field or (field is None and found in field_names(Recipe))


def test_every_synonym_is_of_a_field():
    known = set(field_names(Recipe))
    sections = {field.partition(".")[0] for field in known}
    assert {field for fields in SYNONYMS.values() for field in fields} <= known | sections


def test_run_folders_with_names_of_before_are_refused_by_the_new_name(tmp_path):
    for text, message in (
        (
            '[mixing]\nschedule = "linear"',
            "mixing is not a field of the recipe; the nearest is weight_schedule$",
        ),
        (
            '[objective]\nmix_unit = "token"',
            "objective.mix_unit is not a field .*; the nearest is objective.prefix_mix$",
        ),
    ):
        (tmp_path / "recipe.toml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            read_entry(tmp_path)
    assert nearest_field("mixing.rate", field_names(Recipe)) == "weight_schedule.rate"


def test_a_few_steps_need_no_word_on_the_warm_up():
    warm_ups = [
        make_recipe({"train": {"steps": steps}}).train.warmup_steps
        for steps in (1, 5, 50, 100, 2000)
    ]
    assert warm_ups == [0, 0, 5, 10, 10]


def test_the_usual_rate_falls_with_size():
    sizes = (75_000, 10**9, 4 * 10**9, 10**10, 7 * 10**10)
    assert [usual_lr(size) for size in sizes] == pytest.approx([1e-5, 1e-5, 2.5e-6, 1e-6, 1e-6])
    train = make_recipe({}).train
    assert train.lr is None and with_lr(train, 4 * 10**9).lr == pytest.approx(2.5e-6)
    assert with_lr(train.model_copy(update={"lr": 0.1}), 4 * 10**9).lr == 0.1


# Learning rate, warm-up and steps, which no default may change: of every shipped recipe, and of
# every shipped model.
RATES = {
    "base": (4e-3, 20, 800),
    "columns-plain": (5e-3, 20, 2000),
    "columns-student": (3e-3, 10, 500),
    "columns-teacher": (4e-3, 20, 1000),
    "columns-tiny": (6e-3, 20, 2000),
    "stops-student": (2e-3, 10, 60),
    "stops-teacher": (2e-3, 10, 90),
    "stops-teacher-loop": (2e-3, 10, 90),
    "teacher": (4e-3, 20, 1200),
    "teacher-small": (4e-3, 20, 800),
    "demo": (3e-3, 10, 120),
    "rl": (5e-4, 0, 40),
    "opsd": (1e-3, 10, 100),
    "sdft": (1e-3, 10, 100),
    "qwen3": (5e-7, 0, 1000),
    "smollm2": (2e-4, 0, 5),
}


def test_shipped_recipes_say_their_rates():
    found = {}
    for path in (*SHIPPED_RECIPES.glob("*.toml"), *ASSET_RECIPES.glob("*.toml")):
        train = load_recipe(path).train
        found[path.stem] = (train.lr, train.warmup_steps, train.steps)
    assert found == RATES


# Learning rates that the runs of each shipped study have; of a stage after them by itself.
STUDY_RATES = {
    "paper-mini": ({1e-3, 1.5e-3, 3e-3, 6e-3}, {5e-4, 1.5e-3}),
    "paper-mini-full": ({7.5e-4, 1.5e-3, 3e-3, 6e-3}, {5e-4}),
    "paper-qwen3": ({2e-7, 5e-7, 2e-6}, {1e-6}),
    "quick": ({3e-3}, set()),
    "self-distillation": ({1e-3}, set()),
}


def test_shipped_studies_keep_the_rates_of_their_recipes():
    found = {}
    for path in SHIPPED_STUDIES.glob("*.toml"):
        study = read_study_file(path.stem)
        items = [item for panel in plan(study, {}) for item in panel.items]
        recipes = [item.recipe for item in items if item.kind == "train"]
        rates = [
            {each.train.lr for each in recipes if bool(each.reward.weight) == is_after}
            for is_after in (False, True)
        ]
        found[path.stem] = tuple(rates)
        assert all(each.data.num_prompts for each in recipes)
    assert found == STUDY_RATES


def test_what_a_shipped_recipe_says_of_its_own_model_is_not_for_others(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(to_toml(tiny_recipe(run).resolved()))
    for recipe, fields, names in [
        ("demo", {"student.model": "my/model"}, ["train.lr"]),
        ("demo", {"student.model": "my/model", "train.lr": 1e-4}, []),
        ("demo", {"student.model": "potstill:columns-student"}, []),
        ("demo", {"student.model": str(run / "model")}, []),
        ("demo", {"teacher.model": "my/model"}, []),
        ("qwen3", {"student.model": "Qwen/Qwen3-0.6B-Base", "data.source": "deepscaler"}, []),
        ("qwen3", {"student.model": "my/model"}, ["train.lr"]),
        ("qwen3", {"data.source": "mine.jsonl"}, ["data.num_prompts"]),
        ("smollm2", {"student.model": "build/smollm2/student"}, []),
        ("demo", {"data.source": "mine.jsonl"}, ["data.num_prompts"]),
        ("demo", {"data.source": "columns:plain"}, []),
        ("demo", {"train.steps": 5}, ["train.warmup_steps"]),
        ("demo", {"train.steps": 10}, []),
        ("rl", {"student.model": "my/model"}, ["train.lr"]),
        ("rl", {"student.model": str(run)}, []),
    ]:
        assert left_out(recipe, fields) == names, fields
        data = read_recipe(recipe, fields)
        for name in names:
            section, field = name.split(".")
            assert field not in data[section]
    assert (
        "another model, data or length: train.lr"
        in load_recipe("demo", {"student.model": "x/y"}).notes[0]
    )
    assert not load_recipe("demo").notes
    (tmp_path / "own.toml").write_text((SHIPPED_RECIPES / "demo.toml").read_text())
    assert left_out(tmp_path / "own.toml", {"student.model": "my/model"}) == []


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "r.toml").write_text('[objective]\nprefix = "teacher"\nkl = "forward"\n')
    recipe = load_recipe(
        tmp_path / "r.toml",
        {"objective.kl": "mixed", "objective.forward_weight": 0.2, "out": "runs/a"},
    )
    assert (recipe.objective.prefix, recipe.objective.kl, recipe.objective.forward_weight) == (
        "teacher",
        "mixed",
        0.2,
    )
    assert str(recipe.out) == "runs/a"
    with pytest.raises(RecipeError, match="out is a value, not a section"):
        load_recipe(tmp_path / "r.toml", {"out": "x", "out.b": 1})


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"objective": {"kl": "mixed", "forward_weight": 0.8}},
        {
            "objective": {"prefix": "dataset", "signal": "labels"},
            "data": {"source": "multiplication:persona"},
        },
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
    for data in (
        {"objective": {"prefix": "dataset", "signal": "labels"}},
        {"data": {"source": "x.jsonl"}},
        {},
    ):
        for name in unread_fields(Recipe.model_validate(data)):
            assert any(
                known == name or known.startswith(name + ".") for known in field_names(Recipe)
            ), name


# The fields that comparisons, resumes and studies ask for by role; all others must agree. Another
# role of one of these changes which runs are compared, which groups of seeds there are, and which
# run folders go on.
FIELDS_WITH = {
    Role.SEED: {"data.seed", "train.seed"},
    Role.TUNED: {"train.lr"},
    Role.LENGTH: {"train.steps", "train.extended", "validation.patience"},
    Role.WARM_UP: {"train.warmup_steps"},
    Role.BUDGET: {"train.flops"},
    Role.CACHE: {"teacher.cache"},
    Role.BACKEND: {"train.loss_backend", "rollouts.dtype", "rollouts.engine", "engine.args"},
    Role.ROUNDING: {
        "train.tokens_per_batch",
        "train.packing",
        "train.compile",
        "sampling.batch_size",
        "student.attention",
        "teacher.attention",
        "teacher.placement",
        "teacher.protocol",
        "teacher.device",
        "teacher.url",
    },
    Role.SPEED: {
        "train.loss_memory",
        "train.activation_checkpointing",
        *("engine.python", "engine.url", "engine.timeout", "engine.sleep"),
        *("engine.warn_above", "engine.stop_above"),
    },
    Role.OUTPUT: {
        "out",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.checkpoint_files",
        "train.tracker",
        "validation.every",
        "student.lora.save",
        "teacher.token_variable",
        "teacher.patience",
    },
    Role.VALIDATION: {
        f"validation.{name}"
        for name in Validation.model_fields
        if name not in ("patience", "every")
    },
    Role.EVALUATION: {f"evaluation.{name}" for name in Evaluation.model_fields},
}


def test_every_field_has_one_role():
    roles = roles_of(Recipe)
    assert list(roles) == field_names(Recipe)
    assert all(roles[name] is role_of(name) for name in roles)
    assert {role: set(fields_with(role)) for role in FIELDS_WITH} == FIELDS_WITH
    assert set(fields_with(*Role)) == set(roles)

    class TwoRoles(Section):
        rate: Annotated[float, Role.TUNED, Role.SEED] = 0.0

    class NoRole(Section):
        rate: float = 0.0

    for section, number in ((TwoRoles, 2), (NoRole, 0)):
        with pytest.raises(TypeError, match=f"rate has {number} roles"):
            roles_of(section)


def test_a_name_that_is_no_field_is_not_passed_over():
    recipe = Recipe()
    assert "lr" not in recipe.resolved_without(("train.lr", Role.SEED))["train"]
    assert "teacher" not in recipe.resolved_without(("teacher",))
    for name, nearest in (
        ("train.learning_rate", "train.lr"),
        ("widow", "window"),
    ):
        with pytest.raises(
            ValueError,
            match=f"'{name}' is no field and no section of a recipe; the nearest is {nearest}",
        ):
            recipe.resolved_without((name,))
    with pytest.raises(KeyError):
        role_of("train.learning_rate")
    for question in QUESTIONS:
        recipe.resolved_without(question.compared.about)
    recipe.resolved_without((*ALIKE, *FREE))


def test_a_field_of_one_of_several_teachers_has_a_role_of_its_own():
    there = {"name": "a", "model": "m/a", "url": "http://a:1"}
    begun, moved, other = (
        make_recipe({"objective": {"prefix": "student"}, "teachers": [there | more]})
        for more in ({}, {"url": "http://b:2", "patience": 5}, {"weight": 2})
    )
    assert set(begun.changes_to(moved)) == {"teachers.a.url", "teachers.a.patience"}
    assert begun.identity() == moved.identity() != other.identity()
    assert set(begun.changes_to(other)) == {"teachers.a.weight"}
    roles = [role_of(f"teachers.a.{field}") for field in ("url", "patience", "weight")]
    assert roles == [Role.ROUNDING, Role.OUTPUT, Role.OBJECTIVE]
    (table,) = begun.resolved()["teachers"]
    assert "wire_dtype" in table and "placement" not in table
    assert make_recipe(begun.resolved()) == begun


def test_a_method_s_name_says_the_fields_that_a_study_leaves_out_beside_it():
    mixed, handoff = {"kl": "mixed"}, {"prefix": "mixed", "prefix_mix": "handoff"}
    said = {
        "prefix": ({}, "student"),
        "prefix_mix": ({"prefix": "mixed"}, "token"),
        "student_share": ({"prefix": "mixed"}, 0.3),
        "first_writer": (handoff, "student"),
        "handoff_tokens": (handoff, (1, 2)),
        "kl": ({}, "jsd"),
        "forward_weight": (mixed, 0.3),
        "jsd_weight": ({"kl": "jsd"}, 0.3),
        "skew": ({"kl": "skew-forward"}, 0.3),
        "gamma": ({"prefix": "student", "kl": "reverse"}, 0.3),
        "weights": ({}, "first-tokens"),
        "weights_arguments": ({"weights": "first-tokens"}, {"num": 4}),
    }
    of_reward = {"reward.weight", "reward.start_kl"}
    assert set(fields_with(*NAMED)) == {f"objective.{name}" for name in said} | of_reward
    for name, (others, value) in said.items():
        assert Objective(**others).name != Objective(**(others | {name: value})).name


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
            {
                "kl": "mixed",
                "forward_weight": 0.25,
                "weights": "entropy-aware",
                "weights_arguments": {"above": 1.5},
            },
            "Hybrid(teacher / 0.25 forward + 0.75 reverse; entropy-aware above 1.5)",
        ),
        ({"prefix": "mixed", "student_share": 0.3}, "Hybrid(0.3 student by sequence / forward)"),
        (
            {"prefix": "mixed", "prefix_mix": "handoff"},
            "Hybrid(teacher first for 8-64 tokens / forward)",
        ),
        ({"kl": "jsd"}, "Hybrid(teacher / jsd 0.5)"),
        ({"kl": "skew-reverse", "signal": "topk"}, "Hybrid(teacher / skew-reverse 0.1; top 64)"),
        ({"prefix": "student", "kl": "reverse", "gamma": 1}, "OPD (gamma 1)"),
        (
            {"weights": "split", "weights_arguments": {"at": 16, "after": 0.5}},
            "SFT (split at 16 before 1 after 0.5)",
        ),
        ({"weights": "first-tokens"}, "SFT (first-tokens num 100)"),
        ({"signal": "labels"}, "Hard-label SFT (teacher prefix)"),
    ]:
        assert make_recipe({"objective": objective}).objective.name == name
    opd = {"prefix": "student", "kl": "reverse"}
    for sections, name in [
        ({"objective": opd, "reward": {"weight": 0.3}}, "OPD + 0.3 reward"),
        ({"objective": opd | {"kl": "none"}, "reward": {"weight": 1}}, "GRPO"),
        (
            {"objective": opd | {"kl": "none"}, "reward": {"weight": 1, "start_kl": 0.1}},
            "GRPO + 0.1 KL to the start",
        ),
    ]:
        assert make_recipe(sections).method == name


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"objective": {"prefix": "teacher", "kl": "reverse"}},
            "means over tokens that the student drew",
        ),
        (
            {"objective": {"prefix": "student", "kl": "forward"}},
            "'k1' has the gradient of the reverse KL",
        ),
        (
            {"objective": {"prefix": "student", "kl": "reverse", "estimator": "k3"}},
            "'k3' has the gradient",
        ),
        (
            {"objective": {"prefix": "student", "kl": "mixed"}},
            "'k1' has the gradient of the reverse KL",
        ),
        (
            {"objective": {"prefix": "student", "kl": "reverse"}, "sampling": {"top_k": 5}},
            "drawn exactly from",
        ),
        (
            {"objective": {"prefix": "student", "kl": "reverse", "temperature": 2.0}},
            "set sampling.temperature to it",
        ),
        (
            {"objective": {"prefix": "student", "kl": "reverse"}, "rollouts": {"reuse": 2}},
            "no longer is who drew",
        ),
        (
            {
                "objective": {
                    "prefix": "student",
                    "kl": "reverse",
                    "estimator": "k2",
                    "baseline": "exact",
                }
            },
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
