"""Rollouts of an examination: fewer, then shorter, where the models are slow."""

from contextlib import ExitStack

import pytest
import torch
from conftest import tiny_recipe

from potstill.doctor import writing
from potstill.doctor.writing import Pace, write_first_step
from potstill.models import distributed
from potstill.models.language_model import load_model
from potstill.training.setup import prepare


# Seconds a token for each row; 24 tokens and 8 prompts a step, and 12 s for a writer.
@pytest.mark.parametrize(
    ("seconds", "num", "window", "grows"),
    [(0.001, 8, 24, 1.0), (0.1, 4, 24, 1.0), (0.25, 4, 12, 2.0), (10.0, 4, 8, 3.0)],
)
def test_what_there_is_time_for(tmp_path, monkeypatch, seconds, num, window, grows):
    """Whole responses of half the prompts come before parts of all, and some tokens in any case."""
    recipe = tiny_recipe(tmp_path / "run", objective={"prefix": "student", "kl": "reverse"})

    def pace(given, who, prompts, seeds):
        return Pace(prompts=0.0, token=seconds * len(prompts))

    monkeypatch.setattr(writing, "_pace", pace)
    setup = prepare(recipe, distributed.start())
    written, timing = write_first_step(recipe, setup, lambda text: None)
    assert (len(written.step), written.window, written.is_whole) == (num, window, window == 24)
    assert timing.share == num / 8
    assert timing.writing_grows == pytest.approx(grows)
    num_read = len(setup.prompts[0].token_ids)
    assert timing.learning_grows == pytest.approx((num_read + 24) / (num_read + window))
    assert max(len(rollout.completion_ids) for rollout in written.step) <= window


def test_the_copy_that_writes_in_a_run_writes_here(tmp_path):
    sections = {"objective": {"prefix": "student"}, "rollouts": {"dtype": "bfloat16"}}
    recipe = tiny_recipe(tmp_path / "run", **sections)
    setup = prepare(recipe, distributed.start())
    with ExitStack() as stack:
        found = writing._engines(recipe, setup, stack)["student"].model.state_dict()
    for name, weight in load_model("potstill:base", dtype="bfloat16").model.state_dict().items():
        assert torch.equal(found[name], weight) and found[name].dtype == weight.dtype
    written, _ = write_first_step(recipe, setup, lambda text: None)
    assert written.is_whole and setup.student.model.dtype == torch.float32
