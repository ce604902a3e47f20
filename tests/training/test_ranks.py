"""One, two and four ranks, for every cell and each kind of teacher: the same steps to rounding; and
a run that goes on with another number of them."""

import ctypes
import json
import shutil
from pathlib import Path

import pytest
import served
import torch
import torch.distributed as dist
import transformers
from conftest import make_rollout, tiny_recipe
from forked import Trouble, name_of
from safetensors.torch import load_file

from potstill.config import TeacherSpec, to_toml
from potstill.models import distributed
from potstill.models.language_model import fingerprint, load_model, load_tokenizer
from potstill.models.probe import ready
from potstill.rollouts.batching import make_batch
from potstill.runs import run_folder
from potstill.serving.app import make_app
from potstill.teachers.sharded import load_sharded
from potstill.training import checkpoint

NUMBERS = ("loss", "forward_kl", "reverse_kl", "student_entropy", "grad_norm", "length")
PAIR = {
    "student": {"model": "potstill:stops-student"},
    "teacher": {"model": "potstill:stops-teacher"},
}
TRAIN = {
    "steps": 2,
    # So small that the second step's rollouts are the same to the last token.
    "lr": 1e-6,
    "prompts_per_step": 8,
    "checkpoint_every": 2,
    "tokens_per_batch": 128,
}
CELLS = {
    "sft": {"prefix": "teacher", "kl": "forward"},
    "offline-rl": {"prefix": "teacher", "kl": "reverse"},
    "dagger": {"prefix": "student", "kl": "forward"},
    "opd": {"prefix": "student", "kl": "reverse"},
    "handoff": {
        "prefix": "mixed",
        "prefix_mix": "handoff",
        "handoff_tokens": [1, 8],
        "kl": "mixed",
        "forward_weight": 0.3,
    },
}


def write_recipe(folder, name, cell, **of_teacher):
    sections = {"objective": CELLS[cell], "train": TRAIN, "window": {"tokens": 48}, **PAIR}
    sections["teacher"] = sections["teacher"] | of_teacher
    (folder / f"{name}.toml").write_text(to_toml(tiny_recipe(folder / name, **sections).resolved()))


def train(forks, folder, name, num_ranks, cell, *more, **of_teacher):
    """A run in `folder/name` by so many ranks."""
    write_recipe(folder, name, cell, **of_teacher)
    argv = ["train", f"{name}.toml", "--out", name, *more]
    ended = forks.run_ranks(folder, argv, num_ranks)
    assert ended.code == 0, ended.err
    return run_folder.read_rows(folder / name / "metrics.jsonl")


def assert_same(one, other, rel=1e-5):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for key in NUMBERS:
            assert a[key] == pytest.approx(b[key], rel=rel), key
        assert a["num_loss_tokens"] == b["num_loss_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_ranks_equal_one(tmp_path, forks, cell):
    alone = train(forks, tmp_path, "alone", 1, cell)
    for num_ranks in (2, 4):
        assert_same(alone, train(forks, tmp_path, f"on-{num_ranks}", num_ranks, cell))
        if CELLS[cell]["prefix"] == "student":
            sharded = ("--teacher.placement", "sharded", "--validation.num-prompts", "5")
            found = train(forks, tmp_path, f"sharded-{num_ranks}", num_ranks, cell, *sharded)
            assert_same(alone, found)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["sft", "offline-rl"])
def test_ranks_with_a_cache_equal_one(tmp_path, forks, cell):
    write_recipe(tmp_path, "cached", cell)
    ended = forks.run(tmp_path, ["cache", "build", "cached.toml", "--out", "cache"])
    assert ended.code == 0, ended.err
    given = (cell, "--teacher.cache", "cache")
    alone, *others = (train(forks, tmp_path, f"on-{num}", num, *given) for num in (1, 2, 4))
    for found in others:
        assert_same(alone, found)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["dagger", "opd"])
def test_ranks_with_a_teacher_behind_a_url_equal_one(tmp_path, forks, cell):
    """Each rank asks the server for its own rows; one process that has the teacher is the peer."""
    here = train(forks, tmp_path, "here", 1, cell)
    teacher = ready(PAIR["teacher"]["model"]).requires_grad_(False)
    with served.in_a_thread(make_app(teacher, fingerprint(teacher))) as url:
        for num_ranks in (1, 2, 4):
            found = train(forks, tmp_path, f"there-{num_ranks}", num_ranks, cell, url=url)
            assert_same(here, found)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_run_of_two_ranks_goes_on_with_others(tmp_path, forks, num_ranks):
    """In the middle of a round, whose rollouts are dealt anew."""
    more = ("--rollouts.reuse", "2", "--train.steps", "4", "--train.checkpoint-every", "1")
    more += ("--train.keep-checkpoints", "4")
    whole = train(forks, tmp_path, "whole", 2, "opd", *more)
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    (stopped / "DONE").unlink()
    for step in (2, 3, 4):
        shutil.rmtree(stopped / f"checkpoint/step-{step:06d}")
    ended = train(forks, tmp_path, "stopped", num_ranks, "opd", *more)
    assert [row["rollout_age"] for row in ended] == [0, 1, 0, 1]
    assert_same(whole, ended)


def stop_after(folder, name, step, copied):
    """A run as it was after a step, with the checkpoints up to it."""
    stopped = folder / copied
    shutil.copytree(folder / name, stopped)
    (stopped / "DONE").unlink()
    for later in stopped.glob("checkpoint/step-*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)


def model_of(run):
    return load_file(run / "model/model.safetensors")


IN_SHARDS = ("--train.checkpoint-files", "sharded")
KEPT = ("--train.steps", "4", "--train.checkpoint-every", "1", "--train.keep-checkpoints", "4")


@pytest.mark.slow
def test_checkpoints_in_shards_are_read_by_any_number_of_ranks(tmp_path, forks):
    """To the bit by as many, and as those that are whole."""
    whole = train(forks, tmp_path, "whole", 2, "opd", *KEPT)
    shards = train(forks, tmp_path, "shards", 2, "opd", *KEPT, *IN_SHARDS)
    names = [path.name for path in (tmp_path / "shards/checkpoint/step-000002").iterdir()]
    assert len(names) == 3 and sum(name.startswith("shard-0000") for name in names) == 2
    weights = [
        load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "shards")
    ]
    for num_ranks in (2, 1, 4):
        stop_after(tmp_path, "shards", 2, f"on-{num_ranks}")
        ended = train(forks, tmp_path, f"on-{num_ranks}", num_ranks, "opd", *KEPT, *IN_SHARDS)
        assert_same(shards, ended)
        weights.append(model_of(tmp_path / f"on-{num_ranks}"))
    assert_same(whole, shards, rel=0)
    for other in weights[1:3]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)
    for other in weights[3:]:
        for name in other:
            torch.testing.assert_close(weights[0][name], other[name], rtol=1e-5, atol=1e-6)
    student = load_model(PAIR["student"]["model"])
    checkpoint.load_weights(tmp_path / "shards/checkpoint/step-000004", student)
    own = dict(student.model.named_parameters())
    assert all(torch.equal(own[name], weight) for name, weight in weights[0].items())


@pytest.mark.slow
def test_a_rank_that_is_killed_at_its_shard_leaves_a_run_that_goes_on(tmp_path, forks):
    train(forks, tmp_path, "whole", 2, "opd", *KEPT, *IN_SHARDS)
    write_recipe(tmp_path, "killed", "opd")
    argv = ["train", "killed.toml", "--out", "killed", *KEPT, *IN_SHARDS]
    at_its_second = Trouble(event=2, where="shard-00002")
    killed = forks.run_ranks(tmp_path, argv, 2, trouble=at_its_second)
    assert killed.code != 0 and "potstill: rank 0 waited in vain" in killed.err
    kept = sorted(path.name for path in (tmp_path / "killed/checkpoint").iterdir())
    assert kept == ["step-000001", "unfinished-step-000002"]
    train(forks, tmp_path, "killed", 2, "opd", *KEPT, *IN_SHARDS)
    one, other = (model_of(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not [*(tmp_path / "killed/checkpoint").glob("unfinished-*")]


@pytest.mark.slow
def test_a_damaged_shard_is_named(tmp_path, forks):
    train(forks, tmp_path, "run", 2, "opd", *KEPT, *IN_SHARDS)
    stop_after(tmp_path, "run", 2, "damaged")
    path = next((tmp_path / "damaged/checkpoint/step-000002").glob("shard-00002-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    write_recipe(tmp_path, "damaged", "opd")
    argv = ["train", "damaged.toml", "--out", "damaged", *KEPT, *IN_SHARDS]
    ended = forks.run(tmp_path, argv)
    assert ended.code == 2 and path.name in ended.last_line, ended.err
    assert "was changed after it was written" in ended.last_line


def resident_bytes() -> int:
    """Bytes of memory that this process holds, without what is freed and kept for later."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def signal_on_a_rank(placement: str) -> None:
    """The teacher's signal, and what it holds of the machine's memory after a pass."""
    world = distributed.start()
    # What is loaded at the first use is no weight's.
    load_model("potstill:stops-teacher")
    before = resident_bytes()
    if placement == "sharded":
        teacher = load_sharded(TeacherSpec(model="large", placement="sharded"), world)
    else:
        teacher = load_model("large")
        teacher.requires_grad_(False)
    batch = make_batch([make_rollout([1, 5, 6], [9, 5, 2 + world.rank])])
    signal_ND = teacher.signal_at(batch)
    # One rank passes twice.
    for _ in range(world.rank):
        teacher.signal_at(batch)
    if placement == "sharded":
        teacher.wait_for_passes()
    torch.save(signal_ND, f"{placement}-{world.rank}.pt")
    used = resident_bytes() - before
    Path(f"{placement}-{world.rank}.json").write_text(json.dumps(used))
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_teacher_gives_the_signal_in_less_memory(tmp_path, forks):
    """Each of two ranks holds half of the layers, and a few layers that it has gathered."""
    config = transformers.Qwen3Config(
        vocab_size=128,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "large")
    load_tokenizer("potstill:stops-teacher").save_pretrained(tmp_path / "large")
    layers = sum(weight.nbytes for weight in model.model.layers.parameters())
    for placement in ("replicated", "sharded"):
        ended = forks.run_ranks(tmp_path, [name_of(signal_on_a_rank), placement], num_ranks=2)
        assert ended.code == 0, ended.err
    for rank in range(2):
        whole, part = (
            torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("replicated", "sharded")
        )
        torch.testing.assert_close(part, whole, rtol=1e-6, atol=1e-6)
        whole, part = (
            json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            for name in ("replicated", "sharded")
        )
        # The last layers are gathered, in two copies.
        assert layers / 2 - 4.5 * layers / 24 < whole - part <= layers / 2, (whole, part)
