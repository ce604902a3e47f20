"""Rows of real runs have the fields of their schema, with values of its types, and no others."""

from typing import get_args, get_type_hints

import pytest
from conftest import tiny_recipe
from row_faults import faults
from small_runs import EVALUATION

import potstill
from potstill.runs import schema
from potstill.runs.results_schema import RunEvalRow
from potstill.runs.run_folder import read_rows

RUNS = {
    "whole distributions": {
        "objective": {"prefix": "mixed", "kl": "mixed", "prefix_mix": "token"},
        "window": {
            "schedule": "entropy-gated",
            "start": 6,
            "tokens": 12,
            "check_every": 2,
            "num_probes": 2,
        },
        "evaluation": EVALUATION,
    },
    "labels": {
        "data": {"source": "multiplication:persona"},
        "objective": {"prefix": "dataset", "signal": "labels"},
    },
    "reward": {
        "objective": {"prefix": "student", "kl": "reverse"},
        "reward": {"weight": 1, "group_size": 2, "start_kl": 0.1},
        "rollouts": {"reuse": 2},
    },
}

FILES = {
    "metrics.jsonl": schema.MetricsRow,
    "evals.jsonl": RunEvalRow,
    "samples.jsonl": schema.SampleRow,
    "window.jsonl": schema.WindowRow,
}
# What every run logs; the other files are of runs that are evaluated, or have a gate.
ALWAYS = ("metrics.jsonl", "samples.jsonl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    few = {"steps": 2, "prompts_per_step": 4, "warmup_steps": 0}
    recipes = [tiny_recipe(out / name, **sections, train=few) for name, sections in RUNS.items()]
    return {recipe.out.name: potstill.train(recipe, quiet=True).folder for recipe in recipes}


def test_the_check_finds_what_is_missing_unknown_or_of_another_type():
    good = {"grad_norm": 1.0, "lr": 1}
    assert faults(good, schema.Update) == []
    assert faults({"grad_norm": 1.0}, schema.Update) == [" lacks lr"]
    assert faults(good | {"typo": 1}, schema.Update) == [" has typo"]
    assert faults(good | {"lr": "1"}, schema.Update) == [".lr is '1'"]


@pytest.mark.parametrize("file", FILES)
def test_rows_of_runs_have_their_fields(folders, file):
    rows = {name: read_rows(folder / file) for name, folder in folders.items()}
    assert rows["whole distributions"] and all(rows.values()) == (file in ALWAYS)
    found = [fault for each in rows.values() for row in each for fault in faults(row, FILES[file])]
    assert found == []


def test_names_to_ask_for_are_fields_that_hold_numbers():
    def number_names(kind):
        return {
            name
            for each in get_args(kind)
            for name in (number_names(each) if get_args(each) else [each])
        }

    numbers = (int, float, float | None)
    fields = get_type_hints(schema.MetricsRow)
    assert [
        name for name in number_names(schema.StepNumber) if fields.get(name) not in numbers
    ] == []
    assert set(schema.FLOPS_PARTS) == schema.Flops.__required_keys__
