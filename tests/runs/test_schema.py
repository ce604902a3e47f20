"""Rows of real runs have the fields of their schema, with values of its types, and no others."""

import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from conftest import tiny_recipe
from small_runs import EVALUATION

import potstill
from potstill.runs import schema
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
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    few = {"steps": 2, "prompts_per_step": 4, "warmup_steps": 0}
    recipes = [tiny_recipe(out / name, **sections, train=few) for name, sections in RUNS.items()]
    return {recipe.out.name: potstill.train(recipe, quiet=True).folder for recipe in recipes}


def faults(value: Any, kind: Any, where: str = "") -> list[str]:
    """Where a value read from JSON is not of a type, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        return faults_of_row(value, kind, where)
    if origin in (Union, types.UnionType):
        return (
            [] if any(not faults(value, each) for each in inner) else [f"{where} is {value!r:.60}"]
        )
    if origin is Literal:
        return [] if value in inner else [f"{where} is {value!r:.60}"]
    if origin is dict:
        return [
            fault
            for key, item in value.items()
            for fault in faults(item, inner[1], f"{where}.{key}")
        ]
    if origin in (list, Sequence):
        return [
            fault
            for i, item in enumerate(value)
            for fault in faults(item, inner[0], f"{where}[{i}]")
        ]
    if kind is Any:
        return []
    # JSON has one kind of number.
    allowed = {float: (int, float), int: int, str: str, bool: bool, type(None): type(None)}[kind]
    fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    return [] if fits else [f"{where} is {value!r:.60}"]


def faults_of_row(row: Any, kind: Any, where: str) -> list[str]:
    hints = get_type_hints(kind)
    found = [f"{where} lacks {key}" for key in sorted(kind.__required_keys__ - row.keys())]
    found += [f"{where} has {key}" for key in sorted(row.keys() - hints.keys())]
    known = [key for key in row if key in hints]
    return found + [
        fault for key in known for fault in faults(row[key], hints[key], f"{where}.{key}")
    ]


def test_the_check_finds_what_is_missing_unknown_or_of_another_type():
    good = {"grad_norm": 1.0, "lr": 1}
    assert faults(good, schema.Update) == []
    assert faults({"grad_norm": 1.0}, schema.Update) == [" lacks lr"]
    assert faults(good | {"typo": 1}, schema.Update) == [" has typo"]
    assert faults(good | {"lr": "1"}, schema.Update) == [".lr is '1'"]


@pytest.mark.parametrize("name", RUNS)
def test_metrics_of_a_distillation_have_their_fields(folders, name):
    rows = read_rows(folders[name] / "metrics.jsonl")
    assert len(rows) == 2
    assert [fault for row in rows for fault in faults(row, schema.DistillationRow)] == []


def test_names_to_ask_for_are_fields_that_hold_numbers():
    def number_names(kind):
        return {
            name
            for each in get_args(kind)
            for name in (number_names(each) if get_args(each) else [each])
        }

    numbers = (int, float, float | None)
    fields = get_type_hints(schema.DistillationRow) | get_type_hints(schema.GrpoRow)
    assert [
        name for name in number_names(schema.StepNumber) if fields.get(name) not in numbers
    ] == []
    assert set(schema.FLOPS_PARTS) == schema.Flops.__required_keys__
