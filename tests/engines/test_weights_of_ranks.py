"""The weights of a student that ranks share, as files for servers: the same as those of the whole
student, in the memory of a layer; and no copy of it on any rank."""

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from fake_servers import as_program, by_model, calls, serving, told
from forked import name_of
from safetensors.torch import load_file
from small_runs import rows_of, weights_of
from test_engine_runs import recipe_of

from potstill import load_model
from potstill.config import EngineSpec, Lora, Sampling, to_toml
from potstill.engines.shared import WeightsOfRanks
from potstill.engines.vllm import VllmEngine
from potstill.models import distributed
from potstill.models.adapters import attach, merged_weights
from potstill.models.language_model import load_tokenizer

NUM_LAYERS = 16
# Of glibc's malloc.h.
M_MMAP_THRESHOLD = -3


def memory(key: str) -> int:
    """Bytes of this process that are resident (VmRSS), or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def settle() -> int:
    """Bytes that are resident without what is freed; the most is counted from here on."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def files_on_a_rank(kind: str) -> None:
    """The files of both ranks' servers, beside the student before it is shared."""
    # glibc gives back every tensor that is let go, so that what is counted is what is held.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    world = distributed.start()
    # What is loaded at the first use is no weight's.
    load_model("potstill:base")
    before = settle()
    student: Any = load_model("large")
    if kind == "adapter":
        attach(student.model, Lora(rank=4), seed=0)
        with torch.no_grad():
            for name, weight in student.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        wanted = merged_weights(student.model)
    else:
        wanted = {name: each.clone() for name, each in student.model.state_dict().items()}
    torch.save(wanted, f"wanted-{world.rank}.pt")
    del wanted
    empty = distributed.shard(student, world, is_empty=kind != "copy")
    place, is_here = Path("engine").absolute(), distributed.is_first_here()
    weights = WeightsOfRanks(empty, place, student, world, is_here=is_here)
    shared = settle()
    found = {}
    if kind == "copy":
        distributed.refresh(empty, student)
    else:
        weights.renew(0)
    most = memory("VmHWM")
    if kind != "copy":
        with weights.files() as folder:
            for file in sorted(folder.glob("*.safetensors")):
                found |= load_file(file)
        wanted = torch.load(f"wanted-{world.rank}.pt")
        assert found.keys() >= wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=name)
        assert all(weight.is_meta for weight in empty.parameters())
        distributed.fill(empty, student, is_here=world.is_main)
        assert all(weight.is_meta != world.is_main for weight in empty.parameters())
        head, embedding = empty.get_output_embeddings(), empty.get_input_embeddings()  # pyright: ignore
        assert head.weight is embedding.weight
        distributed.wait_for_all(world)
        weights.close()
    Path(f"{kind}-{world.rank}.json").write_text(json.dumps([shared - before, most - before]))
    dist.destroy_process_group()


def large_model(folder: Path) -> int:
    """Saves a model of which a layer is little; the bytes of its weights."""
    config = transformers.Qwen3Config(
        vocab_size=128,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    load_tokenizer("potstill:stops-teacher").save_pretrained(folder)
    return sum(weight.nbytes for weight in model.parameters())


@pytest.mark.slow
def test_files_of_ranks_are_the_whole_students_in_the_memory_of_a_layer(tmp_path, forks):
    whole = large_model(tmp_path / "large")
    for kind in ("files", "copy", "adapter"):
        ended = forks.run_ranks(tmp_path, [name_of(files_on_a_rank), kind], num_ranks=2)
        assert ended.code == 0, ended.err
    layer = whole / NUM_LAYERS
    for rank in range(2):
        (kept, most), (kept_copy, _) = (
            json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for kind in ("files", "copy")
        )
        print(f"of {whole:,} bytes: {kept:,} kept, {most:,} at most, {kept_copy:,} with a copy")
        assert kept < whole / 2 + 2 * layer and most < kept + 2 * layer
        assert kept_copy > kept + 0.9 * whole


@pytest.mark.slow
@pytest.mark.parametrize("where", ["started", "url"])
def test_ranks_without_a_copy_train_as_one_does(tmp_path, forks, where):
    """Neither is there one of a student in bfloat16, nor for the evaluation at the end, which one
    rank has."""
    evaluation = {"source": "multiplication", "num_problems": 2, "temperatures": [1.0]}
    evaluation |= {"max_tokens": 16, "num_responses": 1}
    with serving(tmp_path / "fake", by_model(load_model("potstill:base").model)) as url:
        for num_ranks in (1, 2):
            engine: dict[str, Any] = {"url": url}
            if where == "started":
                engine = {"url": None, "python": as_program(tmp_path), "stop_above": 1e3}
            recipe = recipe_of(
                tmp_path / f"on-{num_ranks}",
                url,
                engine=engine,
                train={"lr": 1e-6},
                validation={"num_prompts": 0},
                evaluation=evaluation,
            )
            (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolved()))
            argv = ["train", "recipe.toml", "--out", f"on-{num_ranks}"]
            ended = forks.run_ranks(tmp_path, argv, num_ranks)
            assert ended.code == 0, ended.err
    one, two = (rows_of(tmp_path / f"on-{num}") for num in (1, 2))
    for name in ("loss", "reverse_kl", "grad_norm", "length"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4)
    one, two = (rows_of(tmp_path / f"on-{num}", "evals.jsonl") for num in (1, 2))
    assert two[0]["entropy"] == pytest.approx(one[0]["entropy"], rel=1e-4)
    if where == "url":
        assert calls(tmp_path / "fake").count("potstill_reload") == 2 * (4 + 1)
    weights = weights_of(tmp_path / "on-2")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert not [*Path("/dev/shm").glob("potstill-weights-*")]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["replicated", "sharded"])
@pytest.mark.parametrize("num_prompts", [1, 5])
def test_ranks_validate_the_student_that_they_share(tmp_path, forks, teacher, num_prompts):
    """Ranks with no prompt, and with unlike numbers of batches, which are of one row. The best
    student is kept of some, and training goes on with the same numbers, of a head that is the
    embedding."""
    assert load_model("potstill:stops-student").model.config.tie_word_embeddings
    pair = {"student": {"model": "potstill:stops-student"}}
    validation: dict[str, Any] = {"num_prompts": num_prompts, "every": 1}
    keeps = num_prompts > 1
    validation |= {"keep_best": "student_prefix_forward_kl"} if keeps else {}
    with serving(tmp_path / "fake", by_model(load_model("potstill:stops-student").model)) as url:
        for num_ranks in (1, 2):
            where = {"placement": teacher} if num_ranks == 2 else {}
            recipe = recipe_of(
                tmp_path / f"on-{num_ranks}",
                url,
                **pair,
                teacher={"model": "potstill:stops-teacher"} | where,
                train={"lr": 1e-6, "tokens_per_batch": 8, "steps": 2, "checkpoint_every": 1},
                validation=validation,
            )
            (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolved()))
            argv = ["train", "recipe.toml", "--out", f"on-{num_ranks}"]
            ended = forks.run_ranks(tmp_path, argv, num_ranks)
            assert ended.code == 0, ended.err
    one, two = (rows_of(tmp_path / f"on-{num}", "validation.jsonl") for num in (1, 2))
    assert len(one) == len(two) == 3
    for first, second in zip(one, two, strict=True):
        assert second["num_prompts"] == num_prompts and second.keys() <= first.keys()
        # A teacher in shards writes nothing.
        assert ("teacher_length" in second) == (teacher == "replicated")
        for name in second.keys() - {"step", "num_prompts", "max_tokens"}:
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    one, two = (rows_of(tmp_path / f"on-{num}") for num in (1, 2))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4)
    kept = [tmp_path / f"on-{num}/best/model.safetensors" for num in (1, 2)]
    assert [path.exists() for path in kept] == [keeps, keeps]
    if keeps:
        one, two = map(load_file, kept)
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)


HOW = {"max_tokens": 6, "end_ids": (2,), "sampling": Sampling(), "vocab_size": 23}


def dies_on_a_rank(program: str) -> None:
    """The server of one rank dies while the other rank does nothing."""
    world = distributed.start()
    student = load_model("potstill:base")
    empty = distributed.shard(student, world, is_empty=True)
    place = Path(f"engine-{world.rank}").absolute()
    weights = WeightsOfRanks(empty, place, student, world, is_here=distributed.is_first_here())
    engine = VllmEngine(
        empty,
        EngineSpec(python=program),
        place,
        dtype="float32",
        max_tokens=64,
        weights=weights,
    )
    engine.update_weights(1)
    given = ([(1, 5, 6)] * 4, [(7, 0, number) for number in range(4)])
    written = engine.write(*given, **HOW)
    if not world.is_main:
        told(place, die=1)
        assert engine.write(*given, **HOW) == written
        assert calls(place).count("potstill_reload") == 2
    distributed.wait_for_all(world)
    engine.close()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_server_that_dies_gets_the_weights_again_from_one_rank(tmp_path, forks):
    argv = [name_of(dies_on_a_rank), as_program(tmp_path)]
    ended = forks.run_ranks(tmp_path, argv, num_ranks=2)
    assert ended.code == 0 and "the engine has died" in ended.err, ended.err
    assert not [*Path("/dev/shm").glob("potstill-weights-*")]
