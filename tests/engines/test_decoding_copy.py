"""The copy in bfloat16 that writes for a student in float32: whose distribution it draws from, that
it has each step's weights, and what it takes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import interrupted_at, tiny_recipe
from forked import name_of
from small_runs import assert_same_run, rows_of

from potstill import load_model, train
from potstill.config import RecipeError, make_recipe, to_toml
from potstill.engines.protocol import EngineError
from potstill.models import distributed
from potstill.models.sampling import sample
from potstill.planning.memory import memory_of
from potstill.planning.plan import pair_of
from potstill.planning.work import work_of
from potstill.training import loop

ON_POLICY = {"prefix": "student", "kl": "reverse"}


def recipe_of(out, **sections):
    base = {
        "objective": ON_POLICY,
        "rollouts": {"dtype": "bfloat16"},
        # Far enough a step for old weights to be told from new ones.
        "train": {"steps": 3, "lr": 0.01, "warmup_steps": 0, "checkpoint_every": 1},
        "window": {"tokens": 32},
        "validation": {"num_prompts": 0},
    }
    return tiny_recipe(out, **base | sections)


def test_rollouts_are_the_copys_and_each_step_has_its_own(tmp_path, monkeypatch):
    """Written again by transformers' own cast of the checkpoint that the step began with."""
    written = []

    def kept(trainer, run, plan, clock):
        rollouts, flops = write_round(trainer, run, plan, clock)
        weights = {k: v.clone() for k, v in trainer.setup.student.model.state_dict().items()}
        written.append((plan, weights, rollouts))
        return rollouts, flops

    write_round = loop.write_round
    monkeypatch.setattr(loop, "write_round", kept)
    train(recipe_of(tmp_path / "run"), quiet=True)
    model = load_model("potstill:base", dtype="bfloat16").model
    for plan, weights, rollouts in written:
        model.load_state_dict(weights)
        prompts = [prompt.token_ids for prompt in plan.prompts]
        options = {"max_tokens": 32, "end_ids": plan.writing.end_ids}
        options |= {"sampling": plan.writing.sampling, "vocab_size": plan.writing.vocab_size}
        found = sample(model, prompts, plan.seeds, **options)
        for rollout, completion in zip(rollouts, found, strict=True):
            assert rollout.completion_ids == completion.token_ids
            assert rollout.engine_log_probs == completion.log_probs
    for row in rows_of(tmp_path / "run"):
        assert 1e-5 < row["engine_mismatch_mean_abs"] < 0.05


@pytest.mark.parametrize(
    ("sections", "num_copies", "num_refreshed"),
    [
        ({"objective": {"prefix": "teacher", "kl": "forward"}}, 0, 0),
        # Before the first step, and after the last.
        (
            {
                "objective": {"prefix": "teacher", "kl": "forward"},
                "validation": {"num_prompts": 2, "every": 3},
            },
            1,
            2,
        ),
        ({}, 1, 3),
    ],
    ids=["nobody writes", "validation writes", "rollouts"],
)
def test_there_is_a_copy_where_someone_writes_with_it(
    tmp_path, monkeypatch, sections, num_copies, num_refreshed
):
    made, refreshed = [], []
    copied, refresh = distributed._copy, distributed.refresh

    def copies(*given):
        made.append(given)
        return copied(*given)

    def refreshes(decoder, student):
        if decoder is not student.model:
            refreshed.append(decoder)
        refresh(decoder, student)

    monkeypatch.setattr(distributed, "_copy", copies)
    monkeypatch.setattr(distributed, "refresh", refreshes)
    train(recipe_of(tmp_path / "run", **sections), quiet=True)
    assert (len(made), len(refreshed)) == (num_copies, num_refreshed)


def test_old_weights_end_the_run(tmp_path, monkeypatch):
    """The control: a copy that is not renewed."""
    monkeypatch.setattr(distributed, "refresh", lambda decoder, model: None)
    recipe = recipe_of(tmp_path / "run", engine={"stop_above": 0.05})
    with pytest.raises(EngineError, match=r'step 2: .*rollouts.dtype = "float32"'):
        train(recipe, quiet=True)


def test_a_run_resumes_to_the_bit_and_measures_the_student_itself(tmp_path):
    evaluation = {"source": "multiplication", "num_problems": 2, "num_responses": 1}
    evaluation |= {"temperatures": [1.0], "max_tokens": 8}
    sections = {"validation": {"num_prompts": 3, "every": 1}, "evaluation": evaluation}
    whole, halves = (recipe_of(tmp_path / name, **sections) for name in ("whole", "halves"))
    train(whole, quiet=True)
    with interrupted_at(2):
        train(halves, quiet=True)
    train(halves, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    usual = recipe_of(tmp_path / "usual", **sections | {"rollouts": {"dtype": "float32"}})
    train(usual, quiet=True)
    first, second = (rows_of(tmp_path / name, "validation.jsonl")[0] for name in ("whole", "usual"))
    assert first["teacher_prefix_forward_kl"] == second["teacher_prefix_forward_kl"]
    assert all("engine_mismatch_max" not in row for row in rows_of(tmp_path / "usual"))


def test_gates_that_a_device_may_need_are_allowed_and_what_it_does_not_read_is_said(
    tmp_path, capsys
):
    """Without train.compute_dtype a GPU may write in bfloat16, and a CPU does not."""
    sections = {"rollouts": {}, "engine": {"stop_above": 0.1, "warn_above": 0.05}}
    train(recipe_of(tmp_path / "run", **sections | {"train": {"steps": 1}}))
    assert "not read on this device: engine.stop_above, engine.warn_above" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize("signal", ["topk", "full"])
def test_rollouts_that_are_used_again_are_compared_once(tmp_path, signal):
    """Later the student has moved on, which is no fault of who wrote."""
    objective = ON_POLICY | {"signal": signal}
    recipe = recipe_of(
        tmp_path / "run", objective=objective, rollouts={"dtype": "bfloat16", "reuse": 2}
    )
    train(recipe, quiet=True)
    told = ["engine_mismatch_mean_abs" in row for row in rows_of(tmp_path / "run")]
    assert told == [True, False, True]


def test_a_mixture_compares_what_the_student_wrote(tmp_path):
    for mix in ("sequence", "handoff"):
        objective = {"prefix": "mixed", "prefix_mix": mix, "kl": "forward"}
        objective |= {"handoff_tokens": [2, 4]} if mix == "handoff" else {}
        train(recipe_of(tmp_path / mix, objective=objective), quiet=True)
        assert all(row["engine_mismatch_mean_abs"] < 0.05 for row in rows_of(tmp_path / mix))


@pytest.mark.parametrize(
    ("sections", "writes_in"),
    [
        ({}, "float32"),
        ({"train": {"compute_dtype": "bfloat16"}}, "bfloat16"),
        (
            {"train": {"compute_dtype": "bfloat16"}, "rollouts": {"dtype": "float32"}},
            "float32",
        ),
        ({"rollouts": {"dtype": "bfloat16"}, "engine": {"importance_cap": 2.0}}, "bfloat16"),
        ({"student": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"student": {"lora": {"rank": 4}}, "train": {"compute_dtype": "bfloat16"}}, "float32"),
    ],
)
def test_which_type_writes(sections, writes_in):
    objective = ON_POLICY | ({"signal": "sampled"} if "engine" in sections else {})
    recipe = make_recipe({"objective": objective} | sections)
    assert recipe.writes_in(recipe.train.compute_dtype or "float32") == writes_in


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"rollouts": {"dtype": "float32"}, "student": {"dtype": "bfloat16"}},
            "rollouts.dtype is set but not read: the student writes with its own weights",
        ),
        (
            {"engine": {"stop_above": 0.1}, "train": {"compute_dtype": "float32"}},
            "engine.stop_above is set but not read: .*is native",
        ),
        (
            {"engine": {"warn_above": 0.5}},
            "engine.warn_above is 0.5 and engine.stop_above 0.5, which ends the run before",
        ),
        (
            {"rollouts": {"dtype": "bfloat16"}, "engine": {"timeout": 5}},
            "engine.timeout is set but not read: .*this process",
        ),
        (
            {"rollouts": {"dtype": "bfloat16"}, "engine": {"sleep": True}},
            "engine.sleep is set but not read: .*this process",
        ),
    ],
)
def test_fields_that_nothing_reads(sections, message):
    with pytest.raises(RecipeError, match=message.replace("is native", 'is "native"')):
        make_recipe({"objective": ON_POLICY} | sections)


def test_the_plan_knows_the_copy():
    recipes = {
        dtype: make_recipe({"objective": ON_POLICY, "rollouts": {"dtype": dtype}})
        for dtype in ("float32", "bfloat16")
    }
    pair = pair_of(recipes["float32"])
    found = {
        (dtype, num): memory_of(
            recipe, pair, work_of(recipe, 8, 64, num), "live", num_devices=num, on_cpu=True
        )
        for dtype, recipe in recipes.items()
        for num in (1, 2)
    }
    whole = 4 * pair.student.sizes.num_weights
    assert "decoding copy" not in found["float32", 1].kept
    assert found["float32", 2].kept["decoding copy"] == whole
    assert all(found["bfloat16", num].kept["decoding copy"] == whole / 2 for num in (1, 2))
    taught = {"objective": {"prefix": "teacher", "kl": "forward"}}
    by_server = {"objective": ON_POLICY, "rollouts": {"engine": "vllm", "dtype": "bfloat16"}}
    for sections in (taught, by_server):
        for num_prompts in (0, None):
            validation = {} if num_prompts is None else {"num_prompts": num_prompts}
            recipe = make_recipe(sections | {"validation": validation})
            for num in (1, 2):
                kept = memory_of(
                    recipe, pair, work_of(recipe, 8, 64, num), "live", num_devices=num, on_cpu=True
                ).kept
                # Ranks write to validation's prompts with one.
                is_here = num == 2 and num_prompts is None and sections is taught
                assert ("decoding copy" in kept) == is_here
    caches = [found[dtype, 1].phases["rollouts"]["KV cache"] for dtype in recipes]
    assert caches[0] == 2 * caches[1]


def copy_on_a_rank() -> None:
    """The copy of a sharded student, after its weights have changed."""
    world = distributed.start()
    student = load_model("potstill:base")
    copied: Any = distributed.shard(student, world, in_bfloat16=True)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.1)
    distributed.refresh(copied, student)
    for mine, sharded in zip(copied.parameters(), student.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, distributed.whole(sharded).bfloat16())
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    assert all(buffer.dtype == torch.float32 for _, buffer in copied.named_buffers())
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_gather_the_copy_weight_by_weight(tmp_path, forks):
    ended = forks.run_ranks(tmp_path, [name_of(copy_on_a_rank)], num_ranks=2)
    assert ended.code == 0, ended.err


@pytest.mark.slow
def test_ranks_with_the_copy_train(tmp_path, forks):
    recipe = recipe_of(tmp_path / "two", train={"steps": 2, "prompts_per_step": 8})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolved()))
    ended = forks.run_ranks(tmp_path, ["train", "recipe.toml", "--out", "two"], num_ranks=2)
    assert ended.code == 0, ended.err
    assert all(1e-5 < row["engine_mismatch_mean_abs"] < 0.05 for row in rows_of(tmp_path / "two"))
