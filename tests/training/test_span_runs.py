"""Runs with a teacher of another tokenizer, from the command line: they learn, are gone on with,
and are the same wherever the teacher is; and what they cannot have."""

import json

import pytest
import served
from conftest import interrupted_at, tiny_recipe
from small_runs import assert_same_run, rows_of
from two_tokenizers import merging_tokenizer, random_model

import potstill
from potstill.cli.app import main
from potstill.config import RecipeError, to_toml
from potstill.models.language_model import fingerprint, save_model
from potstill.models.probe import ready
from potstill.serving.app import make_app
from potstill.types import DataError, ModelError

SPANS = {"prefix": "student", "kl": "reverse", "signal": "spans"}
QUICK = {"steps": 6, "prompts_per_step": 8, "tokens_per_batch": 512, "warmup_steps": 1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a model whose tokens may have two digits, and that has two ends."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    model = random_model(merging_tokenizer(), seed=1, spread=20)
    ends = (model.tokenizer.eos_token_id, model.tokenizer.bos_token_id)
    save_model(model, model.model.state_dict(), ends, folder)
    return folder


def recipe_of(out, folder, **sections):
    objective = SPANS | sections.pop("objective", {})
    where = {"model": str(folder)} | sections.pop("teacher", {})
    return tiny_recipe(out, teacher=where, objective=objective, **sections)


def test_a_student_learns_from_a_teacher_with_another_tokenizer(teacher, tmp_path, capsys):
    train = {"steps": 16, "prompts_per_step": 24, "tokens_per_batch": 4096, "lr": 1e-2}
    validation = {"num_prompts": 4, "every": 8, "keep_best": "repetition"}
    recipe = recipe_of(tmp_path / "run", teacher, train=train, validation=validation)
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe.resolved()))
    main(["train", str(path)])
    said = capsys.readouterr().err
    assert "OPD (spans, k1)" in said and "left out " in said
    assert "the teacher's ends: </s> (21), <s> (20)" in said and "the teacher reads: '<s>" in said
    assert "the loss is of spans of text: 20 of the student's 23 tokens (87%)" in said
    rows = rows_of(tmp_path / "run")
    losses = [row["loss"] for row in rows]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    for row in rows:
        assert row["loss"] == pytest.approx(row["span_log_ratio"] / row["span_tokens"], rel=1e-5)
        assert 1 <= row["span_tokens"] < 2 and 0 <= row["left_out"] < 0.2
        assert "forward_kl" not in row and "teacher_entropy" not in row
    (validated, *_) = rows_of(tmp_path / "run", "validation.jsonl")
    assert "student_prefix_forward_kl" not in validated and "score" in validated
    sample = rows_of(tmp_path / "run", "samples.jsonl")[0]
    assert len(sample["loss"]) == sum(sample["trained"]) <= len(sample["tokens"])
    assert "teacher_choices" not in sample and sample["teacher_prompt"].startswith("<s>")
    main(["doctor", str(path), "--out", str(tmp_path / "new"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["fit"] and {f["level"] for f in report["findings"]} <= {
        "ok",
        "skipped",
        "warning",
    }
    main(["plan", str(path)])
    assert "OPD (spans, k1)" in capsys.readouterr().out


def test_a_run_is_gone_on_with(teacher, tmp_path):
    whole = potstill.train(recipe_of(tmp_path / "whole", teacher, train=QUICK), quiet=True)
    recipe = recipe_of(tmp_path / "cut", teacher, train=QUICK)
    with interrupted_at(4):
        potstill.train(recipe, quiet=True)
    assert_same_run(whole.folder, potstill.train(recipe, quiet=True).folder)


def test_packed_batches_and_a_teacher_elsewhere_give_the_same_steps(teacher, tmp_path):
    ways = {"here": {}, "packed": {"packing": True}}
    folders = []
    for name, more in ways.items():
        recipe = recipe_of(tmp_path / name, teacher, train=QUICK | more)
        folders.append(potstill.train(recipe, quiet=True).folder)
    model = ready(str(teacher)).requires_grad_(False)
    servers = {
        "states": served.in_a_thread(make_app(model, fingerprint(model))),
        "logprobs": served.that_answers(served.log_probs_of(model)),
    }
    for protocol, server in servers.items():
        with server as url:
            where = {"url": url, "protocol": protocol}
            there = recipe_of(tmp_path / protocol, teacher, train=QUICK, teacher=where)
            folders.append(potstill.train(there, quiet=True).folder)
    first, *others = [rows_of(folder) for folder in folders]
    for rows in others:
        for row, expected in zip(rows, first, strict=True):
            # Rounding grows with the updates.
            rel = 1e-5 if row["step"] == 1 else 0.05
            for name in ("loss", "grad_norm", "span_log_ratio", "span_tokens", "left_out"):
                assert row[name] == pytest.approx(expected[name], rel=rel), name


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"objective": {"prefix": "teacher"}}, 'signal = "spans" on teacher prefixes'),
        ({"objective": {"kl": "forward"}}, "estimator = 'k1' has the gradient of the reverse KL"),
        ({"objective": {"kl": "jsd"}}, "objective.kl is 'jsd'"),
        ({"objective": {"baseline": "exact"}}, "no whole distribution over spans"),
        ({"objective": {"gamma": 0.5}}, 'objective.signal is "spans"; use signal = "full"'),
        ({"objective": {"weights": "position-decay"}}, "which weighs single tokens"),
        ({"objective": {"end_class": "raw"}}, "each model has end tokens of its own"),
        ({"objective": {"top_k": 4}}, 'only "topk" keeps some tokens apart'),
        ({"sampling": {"top_p": 0.9}}, "needs tokens drawn exactly"),
        ({"rollouts": {"reuse": 2}}, "has no importance weights; use reuse = 1"),
        ({"reward": {"weight": 1.0}}, "a reward is of all tokens"),
        ({"teacher": {"cache": "some"}}, "teacher.cache is set, which has the signal on tokens"),
        ({"teachers": [{"name": "b", "model": "c"}]}, "which is of one teacher"),
        (
            {"window": {"schedule": "entropy-gated", "start": 8, "reference": "teacher"}},
            'window.reference is "teacher"',
        ),
        (
            {"validation": {"num_prompts": 2, "keep_best": "student_prefix_forward_kl"}},
            "which compares tokens",
        ),
        (
            {"rollouts": {"engine": "vllm"}, "engine": {"importance_cap": 2.0}},
            "the ratio that it caps is that of single tokens",
        ),
    ],
)
def test_what_takes_a_token_of_both_is_refused(tmp_path, sections, says):
    with pytest.raises((RecipeError, ValueError), match=says):
        recipe_of(tmp_path, "t", **sections)


def test_without_the_signal_the_pair_is_refused_and_told_of_it(teacher, tmp_path):
    recipe = recipe_of(tmp_path / "run", teacher, objective={"signal": "full"})
    with pytest.raises(ModelError, match=r'set objective.signal = "spans" with prefix = "student"'):
        potstill.train(recipe, quiet=True)
    with pytest.raises(ModelError, match=r"20 of the student's 23 tokens"):
        potstill.build_cache(recipe_of(tmp_path / "run", teacher), tmp_path / "cache", quiet=True)


def test_a_step_without_a_span_ends_the_run(teacher, tmp_path):
    recipe = recipe_of(tmp_path / "run", teacher, window={"tokens": 1}, train=QUICK)
    with pytest.raises(DataError, match=r"step 1: none of its completions has a token with a loss"):
        potstill.train(recipe, quiet=True)
