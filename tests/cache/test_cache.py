"""The teacher cache: the same loss as from a live teacher, the same files after any kill, and no
damage unnoticed."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import interrupted_at, make_model, tiny_recipe
from forked import Trouble
from odd_models import make_tokenizer
from safetensors.torch import load_file, save_file

import potstill
from potstill.cache import build as build_module
from potstill.cache import make_shard as shard_module
from potstill.cache.build import build_cache
from potstill.cache.describe import summary, verification_lines
from potstill.cache.verify import verify_cache
from potstill.cli.app import main
from potstill.config import CacheOptions, RecipeError, make_recipe, to_toml
from potstill.files import file_digest, seal
from potstill.kl.topk import top_k_of
from potstill.models.language_model import ASSETS, ModelError, load_model
from potstill.objectives.loss import batch_loss, teacher_signal
from potstill.prompts.examples import load_examples
from potstill.rollouts.batching import make_batches
from potstill.runs import run_folder
from potstill.teachers import shards as shards_module
from potstill.teachers import store as cache_module
from potstill.teachers.manifest import CacheError, Manifest, arrays_digest, read_manifest
from potstill.teachers.shards import INDEX, INDEX_OF_ALL, index_together, read_together
from potstill.teachers.store import Cache
from potstill.training.setup import prepare
from potstill.types import NonFiniteError

SMALL = CacheOptions(rollouts_per_shard=16)
FLOAT32 = dataclasses.replace(SMALL, dtype="float32")
TOPK = dataclasses.replace(SMALL, payload="topk")
COMPLETIONS = dataclasses.replace(SMALL, payload="completions")
TEACHER = {"prefix": "teacher"}


def build(recipe, out, options=SMALL, **objects) -> Manifest:
    return build_cache(recipe, out, options, quiet=True, **objects)


def tree(folder):
    """Every file's bytes, but for the lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A float32 cache of the shipped teacher on the 64 prompts of `tiny_recipe`; not to be
    changed."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    build(tiny_recipe("unused"), folder, FLOAT32)
    return folder


@pytest.fixture
def copied(built, tmp_path):
    return shutil.copytree(built, tmp_path / "cache")


def alone():
    """A process that is not part of a group."""
    from potstill.models import distributed

    return distributed.start()


@pytest.mark.parametrize("kl", ["forward", "reverse", "mixed", "todi"])
@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_loss_and_gradients_are_those_of_the_live_teacher(built, kl, normalize):
    objective = TEACHER | {"kl": kl} | ({"forward_weight": 0.3} if kl == "mixed" else {})
    if kl == "todi":
        objective |= {"kl": "mixed", "weights": "todi"}
    train = {"normalize": normalize}
    setups = [
        prepare(tiny_recipe("unused", objective=objective, train=train, teacher=teacher), alone())
        for teacher in ({"cache": str(built)}, {})
    ]
    rollouts = [setups[0].cache.rollout(prompt, 24) for prompt in setups[0].prompts]
    found = []
    for setup in setups:
        # Other batches than at the build, as a run has them.
        for batch in make_batches(rollouts[:40], 500):
            signal_ = teacher_signal(setup.teacher, batch, setup.loss)
            loss, _, _ = batch_loss(
                setup.student, setup.teacher, signal_, batch, setup.loss, divisor=1000
            )
            loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in setup.student.parameters()])
        found.append((loss.item(), gradient))
    (cached_loss, cached), (live_loss, live) = found
    assert cached_loss == pytest.approx(live_loss, rel=1e-6)
    assert (cached - live).norm() <= 1e-6 * live.norm()


@pytest.mark.parametrize("options", [FLOAT32, TOPK], ids=["hidden", "topk"])
@pytest.mark.parametrize("prefix", ["teacher", "dataset"])
def test_a_run_from_the_cache_is_the_run_with_a_live_teacher(tmp_path, options, prefix):
    """Without the teacher's body, which is deleted; the live run scores the same completions."""
    teacher = tmp_path / "teacher"
    shutil.copytree(ASSETS / "teacher", teacher)
    objective = {"prefix": prefix, "kl": "reverse"} | (
        {"signal": "topk", "top_k": 5} if options is TOPK else {}
    )
    source = {"source": "multiplication:persona"}

    def recipe(name, **more):
        window = {"tokens": 40}
        spec = {"model": str(teacher), **more}
        return tiny_recipe(
            tmp_path / name, data=source, objective=objective, teacher=spec, window=window
        )

    build(recipe("unused"), tmp_path / "cache", options)
    text = {"cache": str(tmp_path / "text")}
    if prefix == "teacher":
        build(recipe("unused"), tmp_path / "text", COMPLETIONS)
    live = potstill.train(
        recipe("live", **text) if prefix == "teacher" else recipe("live"), quiet=True
    )
    shutil.rmtree(teacher)
    cached = potstill.train(recipe("cached", cache=str(tmp_path / "cache")), quiet=True)
    rows = [run_folder.read_rows(run.folder / "metrics.jsonl") for run in (cached, live)]
    assert len(rows[0]) == 4
    for mine, theirs in zip(*rows, strict=True):
        for name in ("loss", "forward_kl", "reverse_kl", "teacher_entropy", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-5), name
        assert mine["num_loss_tokens"] == theirs["num_loss_tokens"]
        # The work of the build is not done again; the head is computed, if it is there.
        assert (
            mine["flops"]["rollout"] == mine["flops"]["teacher"] == 0 < theirs["flops"]["teacher"]
        )
        head = 2 * 23 * 96 * mine["num_loss_tokens"]
        assert theirs["flops"]["head"] - mine["flops"]["head"] == (head if options is TOPK else 0)
        assert theirs["flops"]["rollout"] == 0
    environment = json.loads((cached.folder / "environment.json").read_text())
    assert environment["models"]["teacher"]["name"] == str(teacher)


def test_hard_labels_on_cached_completions_need_no_teacher(tmp_path):
    build(tiny_recipe("unused"), tmp_path / "cache", COMPLETIONS)
    spec = {"cache": str(tmp_path / "cache")}
    objective = TEACHER | {"signal": "labels"}
    result = potstill.train(
        tiny_recipe(tmp_path / "run", objective=objective, teacher=spec), quiet=True
    )
    assert "forward_kl" not in result.metrics and result.metrics["flops"]["teacher"] == 0


def test_a_run_from_the_cache_resumes_to_the_same_bits(built, tmp_path):
    def recipe(name):
        return tiny_recipe(
            tmp_path / name, objective=TEACHER, teacher={"cache": str(built)}, rollouts={"reuse": 2}
        )

    whole = potstill.train(recipe("whole"), quiet=True)
    with interrupted_at(3):
        potstill.train(recipe("stopped"), quiet=True)
    resumed = potstill.train(recipe("stopped"), quiet=True)
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_cache_serves_a_shorter_window_and_another_student(built, tmp_path):
    teacher = {"cache": str(built)}
    recipe = tiny_recipe(
        tmp_path / "run", objective=TEACHER, teacher=teacher, window={"tokens": 10}
    )
    result = potstill.train(recipe, student=make_model(hidden_size=8, seed=3), quiet=True)
    assert 8 < result.metrics["length"] <= 10 and result.metrics["truncation"] > 0.5


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-5), ("int8", 1e-3)])
def test_what_rounding_costs_is_measured_and_printed(tmp_path, dtype, bound):
    manifest = build(
        tiny_recipe("unused"), tmp_path / "cache", dataclasses.replace(SMALL, dtype=dtype)
    )
    verified = verify_cache(tmp_path / "cache", quiet=True)
    # By the definition, in float64, over the whole cache.
    teacher = load_model("potstill:teacher")
    cache = Cache(tmp_path / "cache")
    kls = []
    for places in cache.places().values():
        (batch,) = make_batches([cache.stored_rollout(places[0])], 1)
        rows = [
            teacher(batch.teacher_ids_BT)[0][batch.teacher_mask_BT[0]],
            cache.rows_of(batch.rollouts, teacher.head),
        ]
        live, stored = (teacher.head(row.double()).log_softmax(-1) for row in rows)
        kls.append((live.exp() * (live - stored)).sum(-1))
    expected = torch.cat(kls).mean().item()
    assert 1e-9 < expected < bound
    assert manifest.mean_kl == pytest.approx(expected, rel=0.02)
    # The live KL is that of a sample of the cache.
    assert verified.live_kl == pytest.approx(expected, rel=0.6)
    assert (
        f"{manifest.mean_kl:.3g} nats" in "\n".join(verification_lines(verified))
        and verified.broken == ()
    )


def test_bytes_a_token(tmp_path):
    """Real files of both: hidden states of 2560 numbers, and logits over 151,936 tokens."""
    teacher = make_model(hidden_size=2560)
    recipe = tiny_recipe("unused", data={"num_prompts": 8}, teacher={"dtype": "bfloat16"})
    prompts = [{"prompt": f"_{i}23*4="} for i in range(1, 9)]
    teacher.model.to(torch.bfloat16)
    objects = {"student": make_model(), "teacher": teacher, "prompts": prompts}
    manifest = build(recipe, tmp_path / "cache", **objects)
    (path,) = (tmp_path / "cache/shards").iterdir()
    num_tokens = len(load_file(path)["completion_ids"])
    bytes_per_token = path.stat().st_size / num_tokens
    assert manifest.mean_kl is None, "a bfloat16 teacher is stored as it is"
    assert bytes_per_token <= 2 * 2560 + 32
    save_file(
        {"logits": torch.zeros(64, 151_936, dtype=torch.bfloat16)}, tmp_path / "logits.safetensors"
    )
    assert (tmp_path / "logits.safetensors").stat().st_size / 64 >= 50 * bytes_per_token
    assert f"{bytes_per_token:,.1f} bytes a token" in summary(manifest)[0]


def test_a_small_teacher_stays_within_the_bound(tmp_path):
    manifest = build(
        tiny_recipe("unused", window={"tokens": 128}), tmp_path / "cache", CacheOptions()
    )
    assert manifest.total("num_bytes") / manifest.total("num_tokens") <= 2 * 96 + 32


def build_in_parts(out):
    build(tiny_recipe("unused"), Path(out), CacheOptions(rollouts_per_shard=8, completions=2))


def test_killed_builds_end_with_the_same_files(tmp_path, forks):
    """SIGKILL at ten random places, the first prompts first, against one build that was never
    interrupted."""
    whole = forks.call(tmp_path, build_in_parts, "whole")
    assert whole.code == 0, whole.err
    draw, seen = random.Random(0), []
    for _ in range(10):
        # Ten or so events are before the first shard of each build and five a shard, of which there
        # are 16.
        trouble = Trouble(event=draw.randint(1, 22))
        assert forks.call(tmp_path, build_in_parts, "killed", trouble=trouble).is_killed
        if (tmp_path / "killed/manifest.json").exists():
            seen.append(len(read_manifest(tmp_path / "killed").shards))
            # A manifest that is visible is whole.
            Cache(tmp_path / "killed")
    assert len(set(seen)) > 3 and max(seen) >= 8
    build_in_parts(tmp_path / "killed")
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_two_ranks_write_the_files_of_one(tmp_path, forks):
    """Started by torchrun, where the other tests of ranks start them as it does."""
    (tmp_path / "recipe.toml").write_text(to_toml(tiny_recipe("unused").resolved()))
    build_recipe = ["cache", "build", "recipe.toml", "--rollouts-per-shard", "12", "--out"]
    one = forks.run(tmp_path, [*build_recipe, "one"])
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
    ]
    command, environment = (
        [*launcher, "potstill", *build_recipe, "two"],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    two = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    for code, out, err in ((one.code, one.out, one.err), (two.returncode, two.stdout, two.stderr)):
        assert code == 0, err
        assert out.count("bytes a token") == 2 and "64/64" in err
    assert len(tree(tmp_path / "one")) > 6 and tree(tmp_path / "one") == tree(tmp_path / "two")


def test_more_prompts_and_completions_are_added_once(tmp_path):
    def recipe(num):
        return tiny_recipe("unused", data={"num_prompts": num})

    first = build(recipe(20), tmp_path / "cache")
    before = tree(tmp_path / "cache")
    again = build(recipe(20), tmp_path / "cache")
    assert again == first and tree(tmp_path / "cache") == before
    build(recipe(50), tmp_path / "cache")
    more = build(recipe(50), tmp_path / "cache", dataclasses.replace(SMALL, completions=3))
    assert first.shards == more.shards[: len(first.shards)]
    assert all(
        tree(tmp_path / "cache")[name] == data
        for name, data in before.items()
        if name not in ("manifest.json", INDEX_OF_ALL)
    )
    # The task draws some problems twice.
    num_distinct = len(
        {example.prompt for example in load_examples("multiplication", num_examples=50)}
    )
    assert more.total("num_rollouts") == 3 * num_distinct
    cache = Cache(tmp_path / "cache")
    for places in cache.places().values():
        texts = {cache.stored_rollout(place).completion_ids for place in places}
        assert len(places) == 3 and len(texts) > 1

    # An epoch has every completion of every prompt once.
    setup = prepare(
        tiny_recipe(
            "unused",
            objective=TEACHER,
            teacher={"cache": str(tmp_path / "cache")},
            data={"num_prompts": 20},
        ),
        alone(),
    )
    assert len(setup.prompts) == 60
    counts = {prompt.example.id: 0 for prompt in setup.prompts}
    for prompt in setup.prompts:
        counts[prompt.example.id] += 1
    assert set(counts.values()) == {3}


def test_a_completion_does_not_depend_on_what_else_is_built(tmp_path):
    """Content-addressed: the prompts in another order, in other shards, have the same
    completions."""
    rows = [{"prompt": f"_{i}7*{j}="} for i in range(1, 5) for j in (3, 8)]
    objects = {"student": load_model("potstill:base")}
    build(tiny_recipe("unused"), tmp_path / "a", prompts=rows, **objects)
    options = dataclasses.replace(SMALL, rollouts_per_shard=3)
    build(tiny_recipe("unused"), tmp_path / "b", options, prompts=rows[::-1], **objects)
    texts = []
    for name in ("a", "b"):
        cache = Cache(tmp_path / name)
        texts.append(
            {
                key: cache.stored_rollout(place).completion_ids
                for key, (place,) in cache.places().items()
            }
        )
    assert texts[0] == texts[1]


def test_the_teachers_own_prompt_is_what_counts(tmp_path):
    rows = [{"prompt": f"__{i}*3=", "hint": f"__{i}*3=__{i}*3="} for i in range(11, 27)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "rows.jsonl"), "num_prompts": None}

    def recipe(name, **more):
        return tiny_recipe(
            tmp_path / name, data=data, objective=TEACHER, teacher={"prompt_column": "hint", **more}
        )

    build(recipe("unused"), tmp_path / "cache", FLOAT32)
    build(recipe("unused"), tmp_path / "text", COMPLETIONS)
    runs = [
        potstill.train(recipe(f"{name} run", cache=str(tmp_path / name)), quiet=True)
        for name in ("cache", "text")
    ]
    assert runs[0].metrics["loss"] == pytest.approx(runs[1].metrics["loss"], rel=2e-5)
    with pytest.raises(CacheError, match="16 of 16 prompts are not in cache"):
        potstill.train(
            tiny_recipe(
                tmp_path / "x",
                data=data,
                objective=TEACHER,
                teacher={"cache": str(tmp_path / "cache")},
            )
        )


def test_top_k_of_a_cache_is_that_of_the_live_teacher(tmp_path):
    """With an end class of two ids, and cut to fewer than were stored."""
    student, teacher = make_model(seed=0), make_model(hidden_size=24, seed=1, eos_token_id=22)
    prompts = [{"prompt": f"_{i}23*4="} for i in range(1, 9)]
    objects = {"student": student, "teacher": teacher, "prompts": prompts}
    objective = {"prefix": "teacher", "signal": "topk", "top_k": 8, "temperature": 1.3}
    build(tiny_recipe("unused", objective=objective), tmp_path / "cache", TOPK, **objects)
    for k in (8, 3):
        spec = {"cache": str(tmp_path / "cache")}
        setup = prepare(
            tiny_recipe("unused", objective=objective | {"top_k": k}, teacher=spec),
            alone(),
            **objects,
        )
        (batch,) = make_batches(
            [setup.cache.rollout(prompt, 24) for prompt in setup.prompts], 10_000
        )
        found = teacher_signal(setup.teacher, batch, setup.loss)
        options = {"vocab_size": 23, "temperature": 1.3, "end_ids": (2, 22)}
        live = top_k_of(
            teacher(batch.teacher_ids_BT)[batch.teacher_mask_BT], teacher.head, k, **options
        )
        for field in dataclasses.fields(live):
            torch.testing.assert_close(
                getattr(found, field.name), getattr(live, field.name), rtol=1e-4, atol=1e-5
            )
    with pytest.raises(CacheError, match=r"holds the 8 likeliest tokens and objective\.top_k is 9"):
        prepare(
            tiny_recipe("unused", objective=objective | {"top_k": 9}, teacher=spec),
            alone(),
            **objects,
        )
    with pytest.raises(CacheError, match='use signal = "topk" at that temperature'):
        prepare(tiny_recipe("unused", objective=TEACHER, teacher=spec), alone(), **objects)
    assert 0 <= verify_cache(tmp_path / "cache", teacher=teacher, quiet=True).live_kl < 1e-6


# -- refused ---------------------------------------------------------------------------------------


def test_another_teacher_is_refused(copied, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ASSETS / "teacher", other)
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    weights[name][0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})

    def recipe(**spec):
        return tiny_recipe(
            tmp_path / "run", objective=TEACHER, teacher={"cache": str(copied), **spec}
        )

    with pytest.raises(
        CacheError,
        match=r"is of the teacher 'potstill:teacher' with files \w+, and .*/other' has \w+",
    ):
        potstill.train(recipe(model=str(other)), quiet=True)
    with pytest.raises(CacheError, match=r"with parameters \w+"):
        potstill.train(recipe(), teacher=make_model(), quiet=True)
    with pytest.raises(
        CacheError, match=r"teacher.model = 'potstill:teacher' and the recipe has 'who/knows'"
    ):
        potstill.train(recipe(model="who/knows"), quiet=True)
    with pytest.raises(CacheError, match=r"with dtype float32, and .* has bfloat16"):
        potstill.train(recipe(dtype="bfloat16"), quiet=True)
    with pytest.raises(CacheError, match=r"built with parameters = .* and the recipe has"):
        build(tiny_recipe("unused", teacher={"model": str(other)}), copied, FLOAT32)
    with pytest.raises(CacheError, match="is of the teacher 'potstill:teacher'"):
        verify_cache(copied, teacher=str(other), quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(built, tmp_path):
    student = make_model()
    student.tokenizer = make_tokenizer()
    recipe = tiny_recipe(tmp_path / "run", objective=TEACHER, teacher={"cache": str(built)})
    with pytest.raises(
        ModelError, match=r"tokenizers of student 'model-0' and teacher 'potstill:teacher' differ"
    ):
        potstill.train(recipe, student=student, quiet=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"window": {"tokens": 25}}, "built with window.tokens = 24 and the recipe has 25"),
        ({"sampling": {"temperature": 0.7}}, r"sampling = .*1\.0.* has .*0\.7"),
        ({"data": {"num_prompts": 65}}, "of 65 prompts are not in cache"),
        (
            {"objective": {"prefix": "dataset"}, "data": {"source": "multiplication:persona"}},
            "writer = 'teacher'",
        ),
    ],
)
def test_what_was_not_written_so_is_refused(built, tmp_path, sections, message):
    sections = {"objective": TEACHER, **sections}
    with pytest.raises(CacheError, match=message):
        potstill.train(
            tiny_recipe(tmp_path / "run", teacher={"cache": str(built)}, **sections), quiet=True
        )
    assert not (tmp_path / "run").exists()


def test_another_end_set_is_refused(built, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", objective=TEACHER, teacher={"cache": str(built)})
    with pytest.raises(CacheError, match=r"the end set = \[2\] and the recipe has \[2, 22\]"):
        potstill.train(recipe, student=make_model(eos_token_id=22), quiet=True)


def test_recipes_that_a_cache_cannot_serve():
    with pytest.raises(RecipeError, match="a cache has one writer"):
        make_recipe({"objective": {"prefix": "mixed"}, "teacher": {"cache": "somewhere"}})
    with pytest.raises(RecipeError, match="name the model that the cache was built with"):
        make_recipe({"objective": TEACHER, "teacher": {"cache": "somewhere", "model": "self"}})


def test_builds_that_make_no_sense(tmp_path, built):
    for sections, options, message in [
        ({"teacher": {"model": "self"}}, SMALL, "changes from run to run"),
        ({"teachers": [{"name": "a", "model": "start"}]}, SMALL, "a cache holds one teacher"),
        ({"objective": {"prefix": "dataset"}}, COMPLETIONS, "are there already"),
        ({}, dataclasses.replace(SMALL, completions=0), "must be at least 1"),
    ]:
        with pytest.raises(RecipeError, match=message):
            build(tiny_recipe("unused", **sections), tmp_path / "cache", options)
    for sections, options, message in [
        ({"window": {"tokens": 30}}, FLOAT32, "built with window = 24"),
        ({"train": {"seed": 1}}, FLOAT32, "built with seed = 0"),
        ({}, SMALL, "built with dtype = 'float32' and the recipe has 'bfloat16'"),
        ({}, TOPK, "built with payload = 'hidden'"),
    ]:
        with pytest.raises(CacheError, match=message):
            build(tiny_recipe("unused", **sections), built, options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CacheError, match="holds no teacher cache"):
        build(tiny_recipe("unused"), tmp_path / "mine")
    assert not (tmp_path / "cache").exists() and len(list((tmp_path / "mine").iterdir())) == 1


def test_two_builds_of_one_cache(copied):
    from filelock import FileLock

    with (
        FileLock(copied / ".lock"),
        pytest.raises(CacheError, match="being built by another process"),
    ):
        build(tiny_recipe("unused"), copied, FLOAT32)


# -- damaged ---------------------------------------------------------------------------------------


def first_shard(folder):
    return folder / read_manifest(folder).shards[0].file


def train_from(folder, out):
    return potstill.train(
        tiny_recipe(out, objective=TEACHER, teacher={"cache": str(folder)}, train={"steps": 8}),
        quiet=True,
    )


@pytest.mark.parametrize(
    "where",
    ["head of file", "index", "keys", "prompt_ids", "completion_ids", "hidden", "log_sum_exp"],
)
def test_a_flipped_byte_is_found(copied, tmp_path, where):
    path = first_shard(copied)
    data = bytearray(path.read_bytes())
    header_size = int.from_bytes(data[:8], "little")
    offsets = json.loads(data[8 : 8 + header_size])
    name = {"head of file": None, "index": "checksums"}.get(where, where)
    place = 20 if name is None else 8 + header_size + offsets[name]["data_offsets"][0] + 1
    data[place] ^= 4
    path.write_bytes(data)
    if where in ("index", "keys"):
        # A copy of these is used, where there is one.
        (copied / INDEX_OF_ALL).unlink()
    with pytest.raises(CacheError, match=f"shard '{path}' (is damaged|cannot be read)"):
        train_from(copied, tmp_path / "run")
    # Nothing was trained on a batch with it.
    rows = run_folder.read_rows(tmp_path / "run/metrics.jsonl")
    if where in ("index", "keys"):
        assert not (tmp_path / "run").exists()
    else:
        assert len(rows) < 8
    verified = verify_cache(copied, quiet=True)
    assert len(verified.broken) == 1 and str(path) in verified.broken[0]


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_shard_that_is_not_whole_is_found_and_made_again(copied, built, tmp_path, damage, capsys):
    path = first_shard(copied)
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    for attempt in (
        lambda: train_from(copied, tmp_path / "run"),
        lambda: build(tiny_recipe("unused"), copied, FLOAT32),
    ):
        with pytest.raises(
            CacheError, match=rf"shard '{path}' (has \d+ bytes and not|is missing).*--drop-broken"
        ):
            attempt()
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        main(["cache", "verify", str(copied)])
    captured = capsys.readouterr()
    assert str(path) in captured.out and "1 of 4 shards are damaged" in captured.err
    main(["cache", "verify", str(copied), "--drop-broken"])
    build(tiny_recipe("unused"), copied, FLOAT32)
    assert {p.name for p in (copied / "shards").iterdir()} == {
        p.name for p in (built / "shards").iterdir()
    }
    assert path.read_bytes() == first_shard(built).read_bytes()


def test_an_edited_manifest_is_found(copied, tmp_path):
    path = copied / "manifest.json"
    path.write_text(path.read_text().replace('"window": 24', '"window": 64'))
    for attempt in (
        lambda: train_from(copied, tmp_path / "run"),
        lambda: verify_cache(copied, quiet=True),
        lambda: build(tiny_recipe("unused"), copied),
        lambda: main(["cache", "info", str(copied)]),
    ):
        with pytest.raises((CacheError, SystemExit)):
            attempt()
    with pytest.raises(CacheError, match=f"'{path}' was changed after it was written"):
        Cache(copied)
    path.write_text("{")
    with pytest.raises(CacheError, match="is no manifest"):
        Cache(copied)
    path.unlink()
    with pytest.raises(CacheError, match="holds no teacher cache"):
        Cache(copied)


def forge(folder, change):
    """Change a manifest and give it the checksum of what it says now, which is no secret."""
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(
        seal({key: data[key] for key in data if key != "checksum"})
    )


def in_shard(**fields):
    return lambda data: data["shards"][0].update(fields)


FORGERIES = {
    "above": in_shard(file="../victim.safetensors"),
    "absolute": lambda data: data["shards"][0].update(file=data["victim"]),
    "through shards": in_shard(file="shards/../../victim.safetensors"),
    "another kind of file": in_shard(file="shards/0123456789abcdef.txt"),
    "a line after it": in_shard(file="shards/0123456789abcdef.safetensors\n"),
    "no name": in_shard(file=3),
    "no bytes": in_shard(num_bytes=-1),
    "no hidden states": lambda data: data.update(hidden_size=-1),
    "no width": lambda data: data.update(hidden_size=0),
    "NaN": lambda data: data.update(head_scale=float("nan")),
    "infinite": lambda data: data.update(head_softcap=float("inf")),
    "a field less": lambda data: data["settings"].pop("window"),
    "no list": lambda data: data.update(shards=7),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest_deletes_and_reads_nothing_elsewhere(copied, tmp_path, forgery):
    victim = copied.parent / "victim.safetensors"
    shutil.copy(first_shard(copied), victim)

    def change(data):
        data["victim"] = str(victim)
        FORGERIES[forgery](data)
        del data["victim"]

    forge(copied, change)
    before = tree(copied)
    for attempt in (
        lambda: verify_cache(copied, drop_broken=True, quiet=True),
        lambda: read_manifest(copied),
        lambda: train_from(copied, tmp_path / "run"),
        lambda: build(tiny_recipe("unused"), copied, FLOAT32),
    ):
        with pytest.raises(
            CacheError, match=r"manifest.json': .*, which no build writes .*; restore it"
        ):
            attempt()
    assert victim.exists() and tree(copied) == before


@pytest.mark.parametrize("linked", ["shard", "folder"])
def test_links_in_a_cache_are_not_followed(copied, tmp_path, linked):
    shard = first_shard(copied)
    source = shard if linked == "shard" else shard.parent
    target = shutil.move(source, tmp_path / "target")
    source.symlink_to(target)
    # Damaged, so that it would be dropped.
    (source if linked == "shard" else source / shard.name).write_bytes(b"precious")
    with pytest.raises(CacheError, match="is a link; put what it points to in its place"):
        verify_cache(copied, drop_broken=True, quiet=True)
    assert Path(target).exists()


def test_a_build_removes_only_what_a_build_left(copied):
    """Shards that no manifest lists, whole or unfinished, and nothing with another name."""
    shards = copied / "shards"
    theirs = ("notes.txt", ".DS_Store", "0123456789abcdef.safetensors.bak")
    for name in (
        *theirs,
        "0123456789abcdef.safetensors",
        ".unfinished-0123456789abcdef.safetensors",
    ):
        (shards / name).write_text("x")
    (shards / "fedcba9876543210.safetensors").mkdir()
    listed = {Path(record.file).name for record in read_manifest(copied).shards}
    build(tiny_recipe("unused"), copied, FLOAT32)
    assert {path.name for path in shards.iterdir()} == {
        *listed,
        *theirs,
        "fedcba9876543210.safetensors",
    }


def build_two(out):
    objects = {
        "student": make_model(),
        "teacher": make_model(seed=1),
        "prompts": ["__12*3=", "__13*3="],
    }
    build(tiny_recipe("unused"), Path(out), **objects)


def build_two_and_be_killed(out, kill_at):
    left = kill_at

    def counted(real):
        def call(*given):
            nonlocal left
            left -= 1
            return real(*given) if left else os.kill(os.getpid(), signal.SIGKILL)

        return call

    for module, name in (
        (build_module, "save_whole"),
        (shard_module, "save_whole"),
        (build_module, "write_atomically"),
    ):
        setattr(module, name, counted(getattr(module, name)))
    build_two(out)


@pytest.mark.parametrize("kill_at", [1, 2, 3, 4])
def test_a_build_killed_before_its_manifest_goes_on(tmp_path, forks, kill_at):
    """SIGKILL as the head gets its name, as the manifest is first written, as a shard gets its
    name, and before it is listed."""
    build_two(tmp_path / "whole")
    assert forks.call(tmp_path, build_two_and_be_killed, "killed", kill_at).is_killed
    assert (tmp_path / "killed/manifest.json").exists() == (kill_at > 2)
    build_two(tmp_path / "killed")
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_another_head_is_found_at_the_first_use_of_a_shard(copied, tmp_path):
    head = load_file(copied / "head.safetensors")
    torch.manual_seed(0)
    head["weight"] *= 1 + 0.01 * torch.randn_like(head["weight"])
    save_file(head, copied / "head.safetensors")
    with pytest.raises(CacheError, match=r"head.safetensors' is missing or was changed"):
        train_from(copied, tmp_path / "run")
    # Even where the manifest says it is the right one.
    manifest = read_manifest(copied)
    digest = file_digest(copied / "head.safetensors")
    (copied / "manifest.json").write_text(
        dataclasses.replace(manifest, head_sha256=digest).to_json()
    )
    verified = verify_cache(copied, quiet=True)
    assert (
        len(verified.broken) == len(manifest.shards)
        and "does not belong to the head" in verified.broken[0]
    )
    with pytest.raises(
        CacheError,
        match=r"shard '.*' does not belong to the head of the teacher 'potstill:teacher'",
    ):
        train_from(copied, tmp_path / "run")
    assert run_folder.read_rows(tmp_path / "run/metrics.jsonl") == []


def build_six_shards(out) -> Manifest:
    recipe = tiny_recipe("unused", data={"num_prompts": 48})
    return build(recipe, Path(out), dataclasses.replace(SMALL, rollouts_per_shard=8))


def test_a_full_disk_loses_nothing(tmp_path, forks):
    """A limit on file sizes, which some of the shards exceed."""
    whole = build_six_shards(tmp_path / "whole")
    sizes = [shard.num_bytes for shard in whole.shards]
    limit = sizes[0] if sizes[0] < max(sizes) else sizes[0] - 1
    num_before = next(i for i, size in enumerate(sizes) if size > limit)
    ended = forks.call(
        tmp_path, build_six_shards, "full", trouble=Trouble(limits={"RLIMIT_FSIZE": limit})
    )
    assert ended.code == 1 and "CacheError" in ended.last_line
    assert "cannot be written" in ended.last_line and "what is finished is kept" in ended.last_line
    assert "full/shards/" in ended.last_line
    assert (
        len(list((tmp_path / "full/shards").iterdir()))
        == num_before
        == len(read_manifest(tmp_path / "full").shards)
    )
    build_six_shards(tmp_path / "full")
    assert tree(tmp_path / "full") == tree(tmp_path / "whole")


def test_a_teacher_that_is_not_finite_is_not_stored(tmp_path):
    teacher = make_model(seed=1)
    build(
        tiny_recipe("unused"),
        tmp_path / "cache",
        student=make_model(),
        teacher=teacher,
        prompts=["__12*3="],
    )
    with torch.no_grad():
        teacher.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        build(
            tiny_recipe("unused"),
            tmp_path / "bad",
            student=make_model(),
            teacher=teacher,
            prompts=["__12*3="],
        )
    assert read_manifest(tmp_path / "bad").shards == ()


def test_reading_takes_constant_memory(copied):
    """Many shards, one copied; what is mapped is bounded, and nothing else grows."""
    manifest = read_manifest(copied)
    record, source = manifest.shards[0], first_shard(copied)
    records = []
    for i in range(60):
        path = copied / "shards" / f"copy-{i}.safetensors"
        shutil.copy(source, path)
        records.append(dataclasses.replace(record, file=f"shards/{path.name}"))
    cache = Cache(copied, dataclasses.replace(manifest, shards=tuple(records)))
    head = cache.head()
    sizes = []
    for shard in itertools.chain(range(60), range(60)):
        for row in range(record.num_rollouts):
            cache.rows_of([cache.stored_rollout((shard, row))], head)
        assert len(cache._open) <= cache_module.MAX_OPEN_SHARDS
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        sizes.append(int(status["RssAnon"].split()[0]))
    assert sizes[-1] - sizes[20] < 4096, "kB"


def test_info_and_help(built, capsys):
    main(["cache", "info", str(built)])
    out = capsys.readouterr().out
    assert (
        "teacher: potstill:teacher in float32, weights " in out
        and "hidden states in float32" in out
    )
    assert "at most 24 tokens, end set [2], temperature 1, top_p 1, top_k 0, seed 0" in out


# -- many shards -----------------------------------------------------------------------------------


def replicate(folder, num_shards, num_rollouts=0) -> None:
    """Write a manifest of many shards, all like the first but for their keys, without an index of
    all; with so many rollouts of four tokens each, if any."""
    manifest = read_manifest(folder)
    record, tensors = manifest.shards[0], load_file(first_shard(folder))
    if num_rollouts:
        starts = 4 * torch.arange(num_rollouts + 1)
        for name, tensor in tensors.items():
            first = tensor[: 1 if name in INDEX else 4]
            tensors[name] = torch.cat([first] * num_rollouts)
        tensors |= {"prompt_starts": starts, "completion_starts": starts.clone()}
    records = []
    for number in range(num_shards):
        tensors["keys"] = torch.randint(0, 256, tensors["keys"].shape).to(torch.uint8)
        path = folder / "shards" / f"{number:016x}.safetensors"
        save_file(tensors, path)
        arrays = {name: tensors[name].numpy() for name in INDEX}
        records.append(
            dataclasses.replace(
                record,
                file=f"shards/{path.name}",
                num_rollouts=len(tensors["keys"]),
                num_tokens=len(tensors["completion_ids"]),
                num_bytes=path.stat().st_size,
                index=arrays_digest(arrays, INDEX),
            )
        )
    (folder / INDEX_OF_ALL).unlink(missing_ok=True)
    text = dataclasses.replace(manifest, shards=tuple(records)).to_json()
    (folder / "manifest.json").write_text(text)


def index_all(folder) -> None:
    cache = Cache(folder)
    save_file(index_together(cache.manifest.shards, cache.indices), folder / INDEX_OF_ALL)


def same_index(a, b) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in INDEX)


def test_an_index_of_all_shards_opens_none_of_them(copied, monkeypatch):
    replicate(copied, 40)
    slow = Cache(copied)
    index_all(copied)
    with monkeypatch.context() as patched:
        patched.setattr(shards_module, "open_shard", None)
        fast = Cache(copied)
    assert all(map(same_index, slow.indices, fast.indices))
    assert fast.entries() == slow.entries()


def test_an_index_that_lacks_shards_leaves_them_to_themselves(copied):
    """As a build leaves it that is killed between two writes of it."""
    whole = Cache(copied)
    some = index_together(whole.manifest.shards[1:3], whole.indices[1:3])
    save_file(some, copied / INDEX_OF_ALL)
    assert all(map(same_index, Cache(copied).indices, whole.indices))
    build(tiny_recipe("unused"), copied, FLOAT32)
    known = read_together(copied, whole.manifest.shards)
    assert list(known) == [record.file for record in whole.manifest.shards]


@pytest.mark.parametrize("damage", ["foreign", "flipped", "cut", "empty"])
def test_a_foreign_or_damaged_index_is_found(copied, damage):
    path = copied / INDEX_OF_ALL
    tensors = load_file(path)
    if damage == "foreign":
        tensors["keys"] = tensors["keys"].roll(1, 0)
        save_file(tensors, path)
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(b"")
    for read in (Cache, lambda folder: verify_cache(folder, quiet=True)):
        with pytest.raises(CacheError, match=r"is not the index of this cache's shards; remove it"):
            read(copied)
    path.unlink()
    assert verify_cache(copied, quiet=True).broken == ()


def test_a_missing_shard_is_found_though_the_index_has_it(copied):
    first_shard(copied).unlink()
    with pytest.raises(CacheError, match="is missing; restore it"):
        Cache(copied)


@pytest.mark.slow
def test_four_thousand_shards_open_in_two_seconds(copied):
    replicate(copied, 4000, 128)
    seconds = []
    for has_index in (False, True):
        if has_index:
            index_all(copied)
        began = time.process_time()
        cache = Cache(copied)
        seconds.append(time.process_time() - began)
    assert len(cache.indices) == 4000
    print(f"{seconds[0]:.2f} s from the shards, {seconds[1]:.2f} s from one index")
    assert seconds[1] < 2
