"""Teachers in the machine's memory and on a device of their own: the pieces on a CPU, and what is
refused."""

import copy
import sys

import pytest
import torch
from conftest import make_rollout, tiny_recipe

import potstill
from potstill import load_model
from potstill.config import RecipeError, TeacherSpec, make_recipe
from potstill.models.distributed import World
from potstill.models.language_model import fingerprint
from potstill.models.probe import ready
from potstill.planning.memory import memory_of
from potstill.planning.plan import pair_of
from potstill.planning.work import work_of
from potstill.rollouts.batching import make_batch
from potstill.teachers.load import load_teacher
from potstill.teachers.placed import OffloadedTeacher, PlacedTeacher, loading_device, placed
from potstill.training import setup
from potstill.types import ModelError

CPU, META = torch.device("cpu"), torch.device("meta")
BATCH = make_batch([make_rollout([1, 5, 6], [9, 5, 2]), make_rollout([1], [3] * 7)])


@pytest.fixture(scope="module")
def teacher():
    return ready("potstill:teacher").requires_grad_(False)


def test_states_and_head_are_on_the_students_device(teacher):
    """A device without memory stands for the student's: the pass is here, and its results there."""
    there = PlacedTeacher(teacher, CPU, META)
    signal_ND = there.signal_at(BATCH)
    assert signal_ND.device == there.head.weight_VD.device == there.device == META
    assert signal_ND.shape == teacher.signal_at(BATCH).shape
    assert next(there.decoder.parameters()).device == CPU
    here = PlacedTeacher(teacher, CPU, CPU)
    assert torch.equal(here.signal_at(BATCH), teacher.signal_at(BATCH))


def test_offloaded_weights_are_there_for_a_pass_alone(teacher):
    signal_ND, digest = teacher.signal_at(BATCH), fingerprint(teacher)
    theirs = OffloadedTeacher(teacher.around(copy.deepcopy(teacher.model), "theirs"), CPU)
    for _ in range(2):
        assert torch.equal(theirs.signal_at(BATCH), signal_ND)
        assert all(weight.device == META for weight in theirs.parameters())
    assert torch.equal(theirs.head.weight_VD, teacher.head.weight_VD)
    assert theirs.weights_digest() == digest and theirs.flops == teacher.flops
    assert theirs.decoder is None and theirs.vocab_size == teacher.vocab_size


def test_a_run_with_an_offloaded_teacher_has_the_same_bits(tmp_path, monkeypatch):
    """With a length gate and validation, which ask for the teacher's signal by themselves."""
    sections = {
        "objective": {"prefix": "student", "kl": "reverse"},
        "window": {"schedule": "entropy-gated", "tokens": 24, "start": 12, "check_every": 1}
        | {"num_probes": 4, "reference": "teacher"},
        "train": {"steps": 2},
        "validation": {"num_prompts": 2},
    }
    load_teacher, rows = setup.load_teacher, {}

    def brought_in(*given):
        found = load_teacher(*given)
        return OffloadedTeacher(found, CPU) if name == "offloaded" else found

    monkeypatch.setattr(setup, "load_teacher", brought_in)
    for name in ("here", "offloaded"):
        potstill.train(tiny_recipe(tmp_path / name, **sections), quiet=True)
        found = potstill.runs.run_folder.read_metrics(tmp_path / name)
        rows[name] = [(row["loss"], row["grad_norm"], row["window"]) for row in found]
    assert rows["here"] == rows["offloaded"]


def test_what_cannot_be_placed_is_refused_in_one_line(monkeypatch):
    here, there = World(0, 1, CPU), World(0, 2, torch.device("cuda", 0))
    for spec, world, message in (
        ({"placement": "offloaded"}, here, "there is no GPU .*; leave it out"),
        ({"device": "cuda:1"}, here, "this machine has 0 GPUs; name one of them"),
    ):
        with pytest.raises(ModelError, match=message) as raised:
            loading_device(TeacherSpec(**spec), world)
        assert "\n" not in str(raised.value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="which all 2 ranks would share; leave"):
        loading_device(TeacherSpec(device="cuda:1"), there)
    assert loading_device(TeacherSpec(device="cpu"), there) == CPU
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModelError, match=r"pip install 'potstill\[offload\]'"):
        loading_device(TeacherSpec(placement="offloaded"), there)


def test_a_teacher_on_the_students_device_is_none_that_is_placed(teacher):
    assert placed(teacher, TeacherSpec(device="cpu"), World(0, 1, CPU)) is teacher


OFFLOADED, APART = {"placement": "offloaded"}, {"device": "cuda:1"}


@pytest.mark.parametrize(
    ("teacher", "objective", "message"),
    [
        (OFFLOADED, {"prefix": "teacher"}, '"offloaded": .*such a teacher does not write'),
        (OFFLOADED | {"model": "self"}, {"prefix": "student"}, "which is loaded as the student is"),
        (APART | {"model": "self"}, {"prefix": "student"}, "which is loaded as the student is"),
        (APART | OFFLOADED, {"prefix": "student"}, "which says where it is"),
        (APART, {"prefix": "mixed", "prefix_mix": "token"}, "both models on one device"),
        (
            APART | {"url": "http://127.0.0.1:1"},
            {"prefix": "student"},
            "teacher.device is set but not read: its url is set",
        ),
        ({"device": "gpu"}, {"prefix": "student"}, 'teacher.device .*such as "cuda:1"'),
    ],
)
def test_what_does_not_go_together_is_refused(teacher, objective, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe({"teacher": teacher, "objective": objective})


def test_the_plan_knows_what_a_device_holds():
    recipes = {
        name: make_recipe({"objective": {"prefix": "student"}, "teacher": teacher})
        for name, teacher in (("here", {}), ("offloaded", OFFLOADED), ("apart", APART))
    }
    pair = pair_of(recipes["here"])
    found = {
        name: memory_of(recipe, pair, work_of(recipe, 8, 64), "live", on_cpu=False)
        for name, recipe in recipes.items()
    }
    assert pair.teacher is not None
    sizes = pair.teacher.sizes
    assert found["here"].kept["teacher"] == 4 * sizes.num_weights
    for name in ("offloaded", "apart"):
        assert found[name].kept["teacher"] == 4 * sizes.head_weights
    assert found["offloaded"].phases["teacher"]["brought in"] >= 4 * sizes.largest_layer
    assert "activations" not in found["apart"].phases["teacher"]


@pytest.mark.parametrize(
    ("spec", "num_ranks", "is_student", "message"),
    [
        ({"placement": "sharded"}, 2, False, "given as an object, whole on each rank"),
        ({"device": "cpu"}, 1, True, "is the student, which is where it learns"),
    ],
)
def test_a_teacher_that_is_given_is_where_it_is(spec, num_ranks, is_student, message):
    student = load_model("potstill:base")
    given = student if is_student else load_model("potstill:teacher")
    recipe = make_recipe({"teacher": spec, "objective": {"prefix": "student"}})
    world = World(0, num_ranks, torch.device("cpu"))
    with pytest.raises(ModelError, match=message):
        load_teacher(recipe, student, None, world, given.model, given.tokenizer)
