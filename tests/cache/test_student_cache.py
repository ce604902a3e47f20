"""A cache of a student's prefixes: what it stores of their writer, and training from it."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import served
import torch
from conftest import interrupted_at, make_model, tiny_recipe
from forked import Trouble
from safetensors.torch import load_file

import potstill
from potstill.cache.build import build_cache
from potstill.cache.describe import facts
from potstill.cache.verify import verify_cache
from potstill.cli.app import main
from potstill.config import CacheOptions, RecipeError, make_recipe
from potstill.models.distributed import World
from potstill.models.language_model import fingerprint, load_model
from potstill.models.probe import ready
from potstill.objectives.loss import batch_loss, teacher_signal
from potstill.rollouts.batching import make_batches
from potstill.runs import run_folder
from potstill.serving.app import make_app
from potstill.teachers.manifest import CacheError, read_manifest
from potstill.training.setup import prepare
from potstill.types import ModelError

WRITTEN = CacheOptions(writer="student", rollouts_per_shard=16, dtype="float32")
STUDENT = {"prefix": "student", "kl": "reverse"}


def build(out, recipe=None, options=WRITTEN, **objects):
    recipe = recipe or tiny_recipe("unused", objective=STUDENT)
    return build_cache(recipe, out, options, quiet=True, **objects)


def tree(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A float32 cache of what the shipped student writes to 64 prompts; not to be changed."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    build(folder)
    return folder


def from_cache(out, cache, **sections):
    sections = {"objective": STUDENT, "teacher": {"cache": str(cache)}} | sections
    return tiny_recipe(out, **sections)


def alone():
    from potstill.models import distributed

    return distributed.start()


def test_no_validation_is_advised_where_there_could_be_none(built, tmp_path):
    notes = prepare(from_cache(tmp_path / "run", built), alone()).notes
    assert "no validation: no live teacher scores what the student writes" in notes


def test_a_run_does_not_go_on_with_what_another_student_wrote(tmp_path):
    """A cache that is renewed in its place has the same settings and prompts."""
    build(tmp_path / "cache")
    recipe = from_cache(tmp_path / "run", tmp_path / "cache")
    with interrupted_at(2):
        potstill.train(recipe, quiet=True)
    student = load_model("potstill:base")
    with torch.no_grad():
        student.head.weight_VD[5] += 1.0
    student.model.save_pretrained(tmp_path / "other")
    student.tokenizer.save_pretrained(tmp_path / "other")
    shutil.rmtree(tmp_path / "cache")
    build(tmp_path / "cache", options=dataclasses.replace(WRITTEN, model=str(tmp_path / "other")))
    with pytest.raises(run_folder.RunError, match=r'begun with other models .*"writer"'):
        potstill.train(recipe, quiet=True)
    shutil.rmtree(tmp_path / "cache")
    build(tmp_path / "cache", tiny_recipe("unused", objective=STUDENT, train={"seed": 1}))
    with pytest.raises(run_folder.RunError, match="begun with other prompts"):
        potstill.train(recipe, quiet=True)


def test_it_says_who_wrote_and_how_likely_each_token_was(built):
    manifest, student = read_manifest(built), load_model("potstill:base")
    assert manifest.student is not None and manifest.settings.writer == "student"
    assert manifest.student.parameters == fingerprint(student)
    assert (manifest.student.run, manifest.student.step) == (None, None)
    assert f"it is {manifest.student.describe()}, on {manifest.date}" in "\n".join(facts(manifest))
    columns = load_file(built / manifest.shards[0].file)
    ends = columns["completion_starts"].tolist()
    starts = columns["prompt_starts"].tolist()
    for row in range(3):
        prompt = columns["prompt_ids"][starts[row] : starts[row + 1]].long()
        written = columns["completion_ids"][ends[row] : ends[row + 1]].long()
        with torch.no_grad():
            logits_TV = student.model(torch.cat([prompt, written])[None]).logits[0]
        log_probs = logits_TV[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, written[:, None])
        stored = columns["drawn_log_prob"][ends[row] : ends[row + 1]]
        torch.testing.assert_close(stored, log_probs[:, 0], rtol=1e-4, atol=1e-4)
    verified = verify_cache(built, quiet=True)
    assert verified.broken == () and verified.live_kl < 1e-8


def test_a_step_is_that_with_a_live_teacher_without_writing(built, tmp_path):
    """The loss and the gradient of a live teacher on the same rollouts, without its operations."""
    cached = prepare(from_cache("unused", built), alone())
    live = prepare(tiny_recipe("unused", objective=STUDENT), alone())
    rollouts = [cached.cache.rollout(prompt, 24) for prompt in cached.prompts][:20]
    losses = []
    for setup in (cached, live):
        (batch,) = make_batches(rollouts, 10_000)
        signal = teacher_signal(setup.teacher, batch, setup.loss)
        loss_sum, _, _ = batch_loss(setup.student, setup.teacher, signal, batch, setup.loss)
        loss_sum.backward()
        gradient = torch.cat([p.grad.flatten() for p in setup.student.parameters()])
        losses.append((loss_sum.item(), gradient))
    (a, mine), (b, theirs) = losses
    assert a == pytest.approx(b, rel=1e-6)
    assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
    run = potstill.train(from_cache(tmp_path / "run", built), quiet=True)
    rows = run_folder.read_metrics(run.folder)
    assert [row["writer_age"] for row in rows] == [0, 1, 2, 3]
    assert abs(rows[0]["writer_log_ratio_mean"]) < 1e-5
    assert rows[0]["writer_log_ratio_max"] < 1e-3 < rows[3]["writer_log_ratio_mean"]
    # At first the student is the writer, so that the ratio of both is 1.
    objective = STUDENT | {"weights": "prefix-ratio"}
    weighed = potstill.train(from_cache(tmp_path / "w", built, objective=objective), quiet=True)
    mine = run_folder.read_metrics(weighed.folder)
    assert mine[0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4)
    assert mine[3]["loss"] != pytest.approx(rows[3]["loss"], rel=1e-4)
    for row in rows:
        assert row["flops"]["rollout"] == row["flops"]["teacher"] == 0
        assert "engine_mismatch_max" not in row


def test_a_step_takes_less_than_a_third_of_the_operations(tmp_path):
    """Where the teacher is much larger than the student; each token alike."""
    models = {
        "student": {"model": "potstill:columns-student"},
        "teacher": {"model": "potstill:columns-teacher"},
        "objective": STUDENT,
    }
    short = {"train": {"steps": 1}, "window": {"tokens": 24}}
    build(tmp_path / "cache", tiny_recipe("unused", **models, **short))
    models["teacher"]["cache"] = str(tmp_path / "cache")
    cached = potstill.train(tiny_recipe(tmp_path / "cached", **models, **short), quiet=True)
    del models["teacher"]["cache"]
    live = potstill.train(tiny_recipe(tmp_path / "live", **models, **short), quiet=True)
    a_token = [
        sum(r.metrics["flops"].values()) / r.metrics["num_loss_tokens"] for r in (live, cached)
    ]
    assert a_token[0] > 5 * a_token[1]


def test_importance_weights_are_the_ratio_of_both_students(built):
    """The gradient of a sampled KL on an older student's tokens, by the definition in float64."""
    objective = STUDENT | {"signal": "sampled", "estimator": "k1"}
    recipe = from_cache("unused", built, objective=objective, engine={"importance_cap": 1.5})
    setup = prepare(recipe, alone(), student=make_model(seed=5))
    (batch,) = make_batches([setup.cache.rollout(p, 24) for p in setup.prompts][:8], 10_000)
    signal = teacher_signal(setup.teacher, batch, setup.loss)
    loss_sum, _, _ = batch_loss(setup.student, setup.teacher, signal, batch, setup.loss)
    loss_sum.backward()
    mine = torch.cat([p.grad.flatten() for p in setup.student.parameters()]).double()
    student = setup.student.double()
    student.zero_grad()
    rows = student(batch.input_ids_BT)[batch.loss_mask_BT]
    labels_N1 = batch.target_ids_BT[batch.loss_mask_BT][:, None]
    log_q_N = student.head(rows).log_softmax(-1).gather(-1, labels_N1)[:, 0]
    log_p_N = setup.teacher.head(signal).double().log_softmax(-1).gather(-1, labels_N1)[:, 0]
    drawn = [value for rollout in batch.rollouts for value in rollout.engine_log_probs]
    ratio_N = (log_q_N.detach() - torch.tensor(drawn).double()).exp()
    assert (ratio_N > 1.5).any() and (ratio_N < 1.5).any()
    reward_N = (log_p_N - log_q_N.detach()) * ratio_N.clamp(max=1.5)
    (-(reward_N * log_q_N).sum()).backward()
    theirs = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def build_in_parts(out):
    options = dataclasses.replace(WRITTEN, rollouts_per_shard=8)
    build(Path(out), options=options)


@pytest.mark.slow
def test_killed_builds_end_with_the_same_files(tmp_path, forks):
    assert forks.call(tmp_path, build_in_parts, "whole").code == 0
    draw = random.Random(1)
    for _ in range(3):
        trouble = Trouble(event=draw.randint(6, 22))
        assert forks.call(tmp_path, build_in_parts, "killed", trouble=trouble).is_killed
    build_in_parts(tmp_path / "killed")
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_a_run_writes_as_it_is_now(tmp_path):
    """As its newest checkpoint has it, at an older one, and when it is finished; the age is counted
    from there."""

    def run(name, **sections):
        train = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 4}
        return tiny_recipe(tmp_path / name, objective=STUDENT, train=train, **sections)

    few, name = {"num_prompts": 8}, str(tmp_path / "run")
    options = dataclasses.replace(WRITTEN, model=name)
    recipe = tiny_recipe("unused", objective=STUDENT, data=few)
    with interrupted_at(3):
        potstill.train(run("run"), quiet=True)
    newest = build(tmp_path / "newest", recipe, options).student
    with pytest.raises(CacheError, match="the student = 'potstill:base, weights"):
        build(tmp_path / "base", recipe)
        build(tmp_path / "base", recipe, options)
    whole = potstill.train(run("run"), quiet=True)
    with pytest.raises(CacheError, match=r"built with the student = .*run after step 3, .* has"):
        build(tmp_path / "newest", recipe, options)
    last = build(tmp_path / "last", recipe, options).student
    older = dataclasses.replace(options, model=f"{name}/checkpoint/step-000002")
    second = build(tmp_path / "second", recipe, older).student
    assert [each.step for each in (second, newest, last)] == [2, 3, 4]
    assert last.parameters == fingerprint(whole.student)
    assert len({each.parameters for each in (second, newest, last)}) == 3
    assert {each.run for each in (second, newest, last)} == {
        whole.folder.joinpath("DONE").read_text().strip()
    }
    # A run from the finished student on what it wrote two steps before.
    teacher = {"cache": str(tmp_path / "second")}
    sections = {"data": few, "student": {"model": name}, "teacher": teacher}
    after = potstill.train(
        tiny_recipe(tmp_path / "after", objective=STUDENT, **sections), quiet=True
    )
    assert after.metrics["writer_age"] == 2 + 3
    with pytest.raises(ModelError, match="is no checkpoint of the run"):
        build(tmp_path / "x", recipe, dataclasses.replace(older, model=f"{name}/checkpoint/step-9"))


def test_a_run_resumes_to_the_same_bits(built, tmp_path):
    whole = potstill.train(from_cache(tmp_path / "whole", built), quiet=True)
    with interrupted_at(3):
        potstill.train(from_cache(tmp_path / "stopped", built), quiet=True)
    resumed = potstill.train(from_cache(tmp_path / "stopped", built), quiet=True)
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_teacher_elsewhere_scores(built, tmp_path):
    """The files of a teacher here, but for who told its weights."""
    teacher = ready("potstill:teacher").requires_grad_(False)
    with served.in_a_thread(make_app(teacher, fingerprint(teacher))) as url:
        recipe = tiny_recipe("unused", objective=STUDENT, teacher={"url": url})
        manifest = build(tmp_path / "cache", recipe)
    here = read_manifest(built)
    assert manifest.teacher == dataclasses.replace(here.teacher, files=None)
    for mine, theirs in zip(manifest.shards, here.shards, strict=True):
        a, b = load_file(tmp_path / "cache" / mine.file), load_file(built / theirs.file)
        assert torch.equal(a["completion_ids"], b["completion_ids"])
        torch.testing.assert_close(a["hidden"], b["hidden"], rtol=1e-5, atol=1e-5)
    potstill.train(from_cache(tmp_path / "run", tmp_path / "cache"), quiet=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"reward": {"weight": 1.0}}, "and an older student wrote"),
        ({"objective": STUDENT | {"gamma": 1.0}}, "use gamma = 0"),
        ({"objective": STUDENT | {"signal": "sampled"}}, "set engine.importance_cap, such as 2"),
        ({"engine": {"importance_cap": 2.0}}, "importance_cap is set but not read"),
        (
            {"objective": STUDENT | {"weights": "prefix-ratio"}, "teacher": {}},
            "set teacher.cache to a cache that an older student wrote",
        ),
        (
            {"objective": STUDENT | {"prefix": "mixed"}},
            "a cache has one writer",
        ),
    ],
)
def test_what_an_older_student_cannot_serve_is_refused(sections, message):
    sections = {"objective": STUDENT, "teacher": {"cache": "somewhere"}} | sections
    with pytest.raises(RecipeError, match=message):
        make_recipe(sections)


def test_the_writer_is_who_the_recipe_says(built, tmp_path):
    with pytest.raises(CacheError, match="writer = 'student' and the recipe has 'teacher'"):
        potstill.train(
            from_cache(tmp_path / "run", built, objective={"prefix": "teacher"}), quiet=True
        )
    with pytest.raises(RecipeError, match="set --writer student, or leave it out"):
        build(tmp_path / "x", options=CacheOptions(model="potstill:base"))
    with pytest.raises(RecipeError, match="holds a student's completions"):
        given = {"validation": {"num_prompts": 8}}
        potstill.train(from_cache(tmp_path / "run", built, **given), quiet=True)
    assert not (tmp_path / "run").exists()


def test_ranks_with_one_engine_for_all_are_refused(tmp_path, monkeypatch):
    """One may have a shard to make when the others have none, and would wait for them."""
    monkeypatch.setattr(
        "potstill.models.distributed.start", lambda: World(0, 2, torch.device("cpu"))
    )
    engine = {"rollouts": {"engine": "vllm"}, "engine": {"url": "http://127.0.0.1:1"}}
    with pytest.raises(RecipeError, match=r"there are 2 ranks, .*; remove it, so that each"):
        build(tmp_path / "cache", tiny_recipe("unused", objective=STUDENT, **engine))
    assert not (tmp_path / "cache").exists()


def test_the_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--data.num_prompts", "8", "--window.tokens", "16"]
    main(["cache", "build", "demo", "--out", "c", "--writer", "student", *few])
    out = capsys.readouterr().out
    assert "train from it with --objective.prefix student --teacher.cache c" in out
    assert json.loads(Path("c/manifest.json").read_text())["student"]["name"] == "potstill:base"
