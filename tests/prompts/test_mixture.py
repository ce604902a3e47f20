"""Several sources with weights: shares that hold, passes that are whole, and nothing but the seed
and the step to draw from."""

import json
import tomllib
from collections import Counter

import pytest
from conftest import interrupted_at
from small_runs import assert_same_run

import potstill
from potstill.config import RecipeError, make_recipe, to_toml
from potstill.models.character_tokenizer import build_tokenizer
from potstill.prompts.mixture import make_mixture, step_places
from potstill.prompts.prepare import prepare_prompts
from potstill.seeds import step_indices
from potstill.types import DataError, Example, Prompt


def prompts_of(*sizes):
    return [
        Prompt(example=Example(id=f"{source}-{i}", prompt="p", source=source), token_ids=(1,))
        for source, size in enumerate(sizes)
        for i in range(size)
    ]


def mixture_of(sizes, weights):
    return make_mixture(prompts_of(*sizes), weights, [f"{i}.jsonl" for i in range(len(sizes))])


def drawn(sizes, weights, per_step, num_steps, seed=0):
    """The places of the prompts of the first steps, step by step."""
    mixture, num = mixture_of(sizes, weights), sum(sizes)
    return [step_places(num, mixture, per_step, step, seed) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [((5, 2), (1, 1)), ((3, 4, 6), (0.1, 0.2, 0.7)), ((1, 9), (9, 1)), ((4,), (3.5,))],
)
def test_shares_and_passes(sizes, weights):
    """Counted draw by draw: after each epoch a source is within one place of its share, and a
    prompt comes again when all of its source have come."""
    num, num_epochs = sum(sizes), 60
    sources = [prompt.example.source for prompt in prompts_of(*sizes)]
    places = [i for step in drawn(sizes, weights, num, num_epochs) for i in step]
    for epoch in range(1, num_epochs + 1):
        counts = Counter(sources[i] for i in places[: epoch * num])
        for source, weight in enumerate(weights):
            share = weight / sum(weights) * num * epoch
            assert abs(counts[source] - share) < 1 + 1e-9
    for source, size in enumerate(sizes):
        mine = [i for i in places if sources[i] == source]
        whole = len(mine) // size * size
        passes = [mine[start : start + size] for start in range(0, whole, size)]
        assert all(len(set(each)) == size for each in passes)
        assert size < 3 or len({tuple(each) for each in passes}) > 1


def test_each_place_of_a_step_has_the_shares_in_expectation():
    """Over seeds, as an epoch's order is drawn: 4,000 draws, 5 standard deviations."""
    sizes, weights, num_seeds = (6, 2), (1, 3), 4000
    mixture = mixture_of(sizes, weights)
    for place in (0, 2):
        num_first = sum(
            step_places(8, mixture, 3, 1, seed)[place] < sizes[0] for seed in range(num_seeds)
        )
        assert abs(num_first / num_seeds - 0.25) < 5 * (0.25 * 0.75 / num_seeds) ** 0.5


def test_steps_follow_from_their_numbers_alone():
    sizes, weights = (5, 3), (1, 2)
    steps = drawn(sizes, weights, 3, 40, seed=4)
    one_by_one = drawn(sizes, weights, 1, 120, seed=4)
    assert [i for step in steps for i in step] == [i for step in one_by_one for i in step]
    assert steps != drawn(sizes, weights, 3, 40, seed=5)


def test_weights_as_the_sizes_are_epochs_of_all_prompts():
    for epoch in drawn((4, 2), (2, 1), 6, 5):
        assert sorted(epoch) == list(range(6))


def test_without_weights_steps_are_those_of_one_source():
    assert mixture_of((5, 3), (None, None)) is None is make_mixture(prompts_of(4), (), ())
    for step in range(9):
        assert step_places(8, None, 3, step, 1) == step_indices(8, 3, step, 1)


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ((5, 0), (1, 1), r"'1\.jsonl' has a weight and no prompt is left of it"),
        ((5, 3), (1, 0.01), r"'1\.jsonl' has 0\.0099 of the weights, .* one of the 8 prompts"),
    ],
)
def test_shares_that_cannot_be_had(sizes, weights, message):
    with pytest.raises(DataError, match=message):
        mixture_of(sizes, weights)


TABLES = """
[[data.sources]]
source = "a.jsonl"
weight = 2

[[data.sources]]
source = "owner/name"
split = "test"
weight = 0.5
num_prompts = 10
"""


def test_a_recipe_with_sources_is_what_its_file_says():
    recipe = make_recipe(tomllib.loads(TABLES))
    assert recipe.data.origin == ("a.jsonl", "owner/name")
    assert [source.weight for source in recipe.data.sources] == [2, 0.5]
    resolved = recipe.resolved()
    assert not {"source", "split", "config", "num_prompts"} & resolved["data"].keys()
    again = make_recipe(tomllib.loads(to_toml(resolved)))
    assert again.hash() == recipe.hash() and again.data.sources == recipe.data.sources


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sources": [{"source": "a.csv", "level": ""}]}, r"data\.sources\.0\.level"),
        (
            {"sources": [{"source": "a.csv", "level": "a"}], "level_column": "b"},
            r"data\.level_column is set but not read: each of data\.sources has a level",
        ),
        ({"sources": [{"source": "a.jsonl", "weight": -1}]}, r"data\.sources\.0\.weight is -1: "),
        (
            {"sources": [{"source": "a.jsonl", "wieght": 1}]},
            r"data\.sources\.0\.wieght is not a field .* nearest is data\.sources\.0\.weight",
        ),
        ({"sources": [{"weight": 1}]}, r"data\.sources\.0\.source is missing"),
        ({"sources": [{"source": "multiplication"}]}, r"\.source is the task 'multiplication'"),
        (
            {"sources": [{"source": "a.jsonl", "split": "test"}]},
            r"is the file 'a\.jsonl', which has no splits",
        ),
        (
            {"sources": [{"source": "a.jsonl", "weight": 1}, {"source": "b.jsonl"}]},
            r"data\.sources has weights, and 'b\.jsonl' has none",
        ),
        (
            {"sources": [{"source": "a.jsonl"}], "source": "b.jsonl"},
            r"data\.source is set but not read: data\.sources is set",
        ),
        (
            {"sources": [{"source": "a.csv", "prompt_column": "a", "prompt_template": "{b}"}]},
            "has a prompt_column and a prompt_template",
        ),
    ],
)
def test_sources_that_do_not_fit_are_one_line(data, message):
    with pytest.raises(RecipeError, match=message) as error:
        make_recipe({"data": data})
    assert "\n" not in str(error.value)


class Model:
    """The attributes of a model that the preparing of prompts reads."""

    context_length = None
    tokenizer = build_tokenizer()


def test_each_source_has_its_columns_and_all_prompts_an_id(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,4\n5,6\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "7*8="}\n')
    (tmp_path / "c.jsonl").write_text('{"question": "9*9=", "prompt": "no"}\n')
    sources = [
        {"source": str(tmp_path / "a.csv"), "prompt_template": "{a}*{b}=", "num_prompts": 2},
        {"source": str(tmp_path / "b.jsonl")},
        {"source": str(tmp_path / "c.jsonl"), "prompt_column": "question"},
    ]
    recipe = make_recipe({"data": {"sources": sources}})
    prompts, _ = prepare_prompts(recipe, Model(), None, end_ids=(2,), date="2026-01-01")
    examples = [prompt.example for prompt in prompts]
    assert [e.prompt for e in examples] == ["1*2=", "3*4=", "7*8=", "9*9="]
    assert [e.source for e in examples] == [0, 0, 1, 2]
    assert len({e.id for e in examples}) == 4


def test_levels_are_a_column_s_or_a_source_s(tmp_path):
    """As `only` of a teacher names them."""
    (tmp_path / "a.csv").write_text("prompt,domain\n1*2=,maths\n3*4=,\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "7*8="}\n')
    sources = [
        {"source": str(tmp_path / "a.csv")},
        {"source": str(tmp_path / "b.jsonl"), "level": "code"},
    ]
    data = {"sources": sources, "level_column": "domain"}
    options = {"end_ids": (2,), "date": "2026-01-01"}
    prompts, _ = prepare_prompts(make_recipe({"data": data}), Model(), None, **options)
    assert [prompt.example.level for prompt in prompts] == ["maths", "", "code"]
    del sources[1]["level"]
    with pytest.raises(DataError, match=r"b\.jsonl.* has no column 'domain', only prompt; name"):
        prepare_prompts(make_recipe({"data": data}), Model(), None, **options)


def test_a_run_that_stops_goes_on_with_the_same_prompts(tmp_path):
    for name, num in (("a", 3), ("b", 5)):
        rows = [{"prompt": f"{name == 'a':d}{i}*3=", "completion": f"{i}"} for i in range(num)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        {"source": str(tmp_path / "a.jsonl"), "weight": 3},
        {"source": str(tmp_path / "b.jsonl"), "weight": 1},
    ]

    def run(name):
        few = {"steps": 4, "prompts_per_step": 5, "checkpoint_every": 2, "lr": 3e-3}
        recipe = {
            "out": str(tmp_path / name),
            "data": {"sources": sources},
            "objective": {"prefix": "dataset", "signal": "labels"},
            "window": {"tokens": 24},
            "train": few,
        }
        potstill.train(make_recipe(recipe), quiet=True)

    run("whole")
    with interrupted_at(3):
        run("stopped")
    run("stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
