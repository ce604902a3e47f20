"""Whole runs whose completions an engine in another process writes, against a server that speaks as
vLLM does."""

import dataclasses
import json

import pytest
import torch
from conftest import interrupted_at, make_rollout, tiny_recipe
from fake_servers import as_program, by_model, calls, serving, told

from potstill import load_model, train
from potstill.cache.build import build_cache
from potstill.cli.app import main
from potstill.config import CacheOptions, RecipeError, make_recipe, to_toml
from potstill.doctor.examine import examine
from potstill.engines import mismatch
from potstill.engines.protocol import EngineError
from potstill.runs import run_folder

STUDENT = {"prefix": "student", "kl": "reverse"}
VALIDATION = {"num_prompts": 4, "every": 2}


def recipe_of(out, url, objective=STUDENT, engine=None, **sections):
    sections = {"validation": VALIDATION} | sections
    rollouts = {"engine": "vllm"} | sections.pop("rollouts", {})
    engine = {"url": url, "timeout": 20} | (engine or {})
    return tiny_recipe(out, objective=objective, rollouts=rollouts, engine=engine, **sections)


@pytest.fixture
def program(tmp_path):
    return as_program(tmp_path)


@pytest.fixture
def url(tmp_path):
    """A server with a model as the student's."""
    with serving(tmp_path / "fake", by_model(load_model("potstill:base").model)) as found:
        yield found


def test_a_run_has_each_steps_weights_and_says_how_far_it_is_off(tmp_path, url):
    evaluation = {
        "source": "multiplication",
        "num_problems": 2,
        "num_responses": 2,
        "temperatures": [1.0],
        "max_tokens": 16,
    }
    train(recipe_of(tmp_path / "run", url, evaluation=evaluation), quiet=True)
    rows = run_folder.read_metrics(tmp_path / "run")
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["engine_mismatch_mean_abs"] < 1e-5
        assert row["engine_mismatch_mean_abs"] <= row["engine_mismatch_max"] < 1e-4
    # A version for the start and one for each step; what a step writes needs no second push.
    assert calls(tmp_path / "fake").count("potstill_reload") == 5
    assert calls(tmp_path / "fake").count("reset") == 5
    (found,) = (tmp_path / "run" / "responses").glob("*.jsonl")
    responses = [json.loads(line) for line in found.read_text().splitlines()]
    assert len(responses) == 4 and all(row["entropy"] > 0 for row in responses)


def test_an_adapter_goes_over_merged(tmp_path, url):
    """The server has the student's own module, which takes no weights of another name."""
    validation = {"num_prompts": 0}
    student = {"lora": {"rank": 4, "save": "adapter"}}
    recipe = recipe_of(tmp_path / "run", url, student=student, validation=validation)
    train(recipe, quiet=True)
    rows = run_folder.read_metrics(tmp_path / "run")
    assert len({row["engine_mismatch_max"] for row in rows}) == 4
    assert max(row["engine_mismatch_max"] for row in rows) < 1e-4
    assert calls(tmp_path / "fake").count("potstill_reload") == 4


def test_an_evaluation_has_a_server_for_as_long_as_it_lasts(tmp_path, program, url, capsys):
    """Responses of each engine are in files of their own."""
    settings = ["--num-problems", "2", "--num-responses", "2", "--max-tokens", "16"]
    settings += ["--responses", str(tmp_path / "responses")]
    command = ["evaluate", "potstill:base", *settings]
    main([*command, "--engine", "vllm", "--engine.url", url])
    main([*command, "--engine", "vllm", "--engine.python", program])
    main(command)
    # At two temperatures; the two servers are of one kind, and the second finds all responses.
    assert len(list((tmp_path / "responses").glob("*.jsonl"))) == 4
    assert calls(tmp_path / "fake").count("completion") == 8
    with pytest.raises(SystemExit):
        main([*command, "--engine.url", url])
    assert "--engine.url is read with --engine vllm alone" in capsys.readouterr().err


def test_prompts_without_a_task_are_written_to_by_servers(tmp_path, program, url):
    (tmp_path / "prompts.txt").write_text("12*3=\n45*6=\n")
    command = ["evaluate", "potstill:base", "--prompts", str(tmp_path / "prompts.txt")]
    command += ["--max-tokens", "16", "--engine", "vllm"]
    main([*command, "--engine.url", url, "--out", str(tmp_path / "found.json")])
    (row,) = json.loads((tmp_path / "found.json").read_text())
    assert row["num_prompts"] == 2 and calls(tmp_path / "fake").count("completion") == 2
    main([*command, "--engine.python", program, "--teacher", "potstill:teacher"])


def test_the_doctor_writes_as_the_run_would(tmp_path, url):
    report = examine(recipe_of(tmp_path / "run", url, engine={"stop_above": 1e3}))
    assert report.is_fit and "completion" in calls(tmp_path / "fake")
    assert not (tmp_path / "run").exists()


NUMBERS = ("loss", "reverse_kl", "student_entropy", "grad_norm", "length")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["started", "url"])
def test_two_ranks_write_what_one_does(tmp_path, forks, program, where):
    """A server that is started is one rank's; the weights go once to one at a URL. Of validation's
    prompts one rank has none."""
    evaluation = {"source": "multiplication", "num_problems": 2, "temperatures": [1.0]}
    evaluation |= {"max_tokens": 16, "num_responses": 1}
    found = {}
    with serving(tmp_path / "fake", by_model(load_model("potstill:base").model)) as url:
        for num_ranks in (1, 2):
            out = tmp_path / f"on-{num_ranks}"
            engine = {"url": url} if where == "url" else {"python": program, "stop_above": 1e3}
            recipe = recipe_of(
                out,
                url,
                engine={"url": None} | engine,
                # So small that the next step's rollouts are the same to the last token.
                train={"lr": 1e-6},
                validation={"num_prompts": 1, "every": 4},
                evaluation=evaluation,
            )
            (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolved()))
            argv = ["train", "recipe.toml", "--out", str(out)]
            ended = forks.run_ranks(tmp_path, argv, num_ranks)
            assert ended.code == 0, ended.err
            found[num_ranks] = run_folder.read_metrics(out)
            assert len(run_folder.read_rows(out / "evals.jsonl")) == 1
    for one, other in zip(found[1], found[2], strict=True):
        assert {name: one[name] for name in NUMBERS} == pytest.approx(
            {name: other[name] for name in NUMBERS}, rel=1e-4
        )
    if where == "url":
        # One for each step of both runs, and one for what is written after the last.
        assert calls(tmp_path / "fake").count("potstill_reload") == 2 * (4 + 1)
        assert max(row["engine_mismatch_max"] for row in found[2]) < 1e-4
    else:
        logs = sorted((tmp_path / "on-2" / "engine").glob("*/vllm.log"))
        assert [log.parent.name for log in logs] == ["student-0", "student-1"]


@pytest.mark.slow
def test_an_error_of_the_engine_ends_all_ranks(tmp_path, forks, url):
    recipe = recipe_of(tmp_path / "run", url, validation={"num_prompts": 0})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolved()))
    told(tmp_path / "fake", width=10**6)
    ended = forks.run_ranks(tmp_path, ["train", "recipe.toml", "--out", "run"], 2)
    assert ended.code == 2 and "as many log-probabilities as tokens" in ended.last_line


def test_a_run_that_is_resumed_is_the_same(tmp_path, url):
    objective = STUDENT | {"signal": "topk"}
    train(recipe_of(tmp_path / "whole", url, objective), quiet=True)
    halves = recipe_of(tmp_path / "halves", url, objective)
    with interrupted_at(3):
        train(halves, quiet=True)
    train(halves, quiet=True)
    whole, resumed = (run_folder.read_metrics(tmp_path / name) for name in ("whole", "halves"))
    for one, other in zip(whole, resumed, strict=True):
        assert one["loss"] == other["loss"]
        assert one["engine_mismatch_max"] == other["engine_mismatch_max"] < 1e-4


def test_the_gradient_is_weighed_with_the_ratio_up_to_its_cap(tmp_path, url):
    """The ratio is 1 to rounding where the server has the trainer's model: a cap above it changes
    nothing, and one below it is a factor."""
    options = {
        "objective": STUDENT | {"signal": "sampled"},
        "validation": {"num_prompts": 0},
        "train": {"steps": 1},
    }
    norms = []
    for cap in (None, 2.0, 0.25):
        engine = {} if cap is None else {"importance_cap": cap}
        out = tmp_path / f"cap-{cap}"
        train(recipe_of(out, url, engine=engine, **options), quiet=True)
        norms.append(run_folder.read_metrics(out)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert norms[2] == pytest.approx(norms[0] / 4, rel=1e-3)


def test_other_weights_end_the_run_before_the_update(tmp_path):
    """A server whose model is another one."""
    other = load_model("potstill:base", init="random", seed=3).model

    def random_logits(weights):
        drawn = {name: torch.randn(each.shape).numpy() for name, each in weights.items()}
        return by_model(other)(drawn)

    with (
        serving(tmp_path / "fake", random_logits) as url,
        pytest.raises(EngineError, match=r"step 1: .* nats a token .* nothing was updated"),
    ):
        train(recipe_of(tmp_path / "run", url, validation={"num_prompts": 0}), quiet=True)
    assert run_folder.read_metrics(tmp_path / "run") == []


def test_a_difference_is_warned_of_once(tmp_path, url, capsys):
    engine = {"warn_above": 1e-9}
    train(recipe_of(tmp_path / "run", url, engine=engine, validation={"num_prompts": 0}))
    out = capsys.readouterr()
    assert (out.out + out.err).count("more than engine.warn_above = 1e-09") == 1


def test_an_engine_that_fails_ends_the_run_and_it_goes_on(tmp_path, url):
    recipe = recipe_of(tmp_path / "run", url, validation={"num_prompts": 0})
    with interrupted_at(3):
        train(recipe, quiet=True)
    told(tmp_path / "fake", **{"500": 10**6})
    with pytest.raises(EngineError, match=r"failed 3 times .*told to say 500.* goes on from there"):
        train(recipe, quiet=True)
    told(tmp_path / "fake")
    train(recipe, quiet=True)
    assert len(run_folder.read_metrics(tmp_path / "run")) == 4


def test_both_writers_of_a_mixture_have_an_engine(tmp_path, program):
    """And a cache is written by one. The numbers of this server are no model's, so that only the
    rollouts are looked at."""
    options = {"url": None, "python": program, "stop_above": 1e3}
    for mix in ("sequence", "handoff"):
        objective = {"prefix": "mixed", "prefix_mix": mix, "kl": "forward"}
        objective |= {"handoff_tokens": [2, 5]} if mix == "handoff" else {}
        recipe = recipe_of(tmp_path / mix, None, objective, options, validation={"num_prompts": 0})
        train(recipe, quiet=True)
        assert all(
            (tmp_path / mix / "engine" / who / "vllm.log").exists()
            for who in ("student", "teacher")
        )
    engine = {"python": program}
    recipe = tiny_recipe(
        tmp_path / "run",
        objective={"prefix": "teacher"},
        rollouts={"engine": "vllm"},
        engine=engine,
    )
    manifest = build_cache(recipe, tmp_path / "cache", CacheOptions(), quiet=True)
    assert manifest.total("num_rollouts") == 64
    assert "completion" in calls(tmp_path / "cache" / ".engine" / "teacher")
    # Scored by the teacher here, whoever wrote.
    by_student = CacheOptions(writer="student")
    manifest = build_cache(recipe, tmp_path / "older", by_student, quiet=True)
    assert manifest.student is not None and manifest.total("num_rollouts") == 64
    assert "completion" in calls(tmp_path / "older" / ".engine" / "student")


def test_merged_ends_and_the_teachers_tokens_are_not_compared():
    rollout = dataclasses.replace(
        make_rollout((1,), (5, 6, 2), trained=(True, False, True)),
        engine_log_probs=(-1.0, -2.0, -3.0),
    )
    like = torch.zeros(0)
    assert mismatch.told_log_probs([rollout], (2,), like).tolist() == [-1.0, -3.0]
    told_N = mismatch.told_log_probs([rollout], (2, 3), like)
    assert told_N[0] == -1 and told_N[1].isnan()
    ours_N = torch.tensor([-0.5, -9.0])
    assert mismatch.gaps(told_N, ours_N).tolist() == [-0.5]
    ratio_N = mismatch.importance_ratio(told_N, ours_N, 1.5)
    assert ratio_N.tolist() == [1.5, 1.0]
    by_teacher = dataclasses.replace(rollout, writers=("teacher",) * 3)
    assert mismatch.told_log_probs([by_teacher], (), like).isnan().all()
    assert mismatch.told_log_probs([make_rollout((1,), (5,))], (), like) is None


VLLM = {"rollouts": {"engine": "vllm"}}
ON_POLICY = VLLM | {"objective": STUDENT}
BY_TOKEN = {"objective": {"prefix": "mixed", "prefix_mix": "token"}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"timeout": 5}}, 'engine.timeout is set but not read: rollouts.engine is "na'),
        ({"engine": {"url": "127.0.0.1:8"}}, "engine.url is '127.0.0.1:8': give a URL"),
        ({"engine": {"args": ["--port", "8"]}}, "'--port' is what potstill itself says"),
        (
            ON_POLICY | {"engine": {"url": "http://h:8", "args": ["--x"]}},
            "engine.args is set but not read: engine.url is set",
        ),
        (VLLM | BY_TOKEN, 'objective.prefix_mix is "token"'),
        (VLLM | {"engine": {"url": "http://h:8"}}, "engine.url is set and objective.prefix is"),
        (
            ON_POLICY | {"engine": {"importance_cap": 2.0}},
            "engine.importance_cap is set but not read: the gradient is that of whole",
        ),
        (VLLM | {"teacher": {"model": "self"}}, 'teacher.model is "self" and objective.prefix is'),
    ],
)
def test_recipes_that_do_not_fit_are_refused(sections, message):
    with pytest.raises(RecipeError) as error:
        make_recipe(sections)
    assert message in str(error.value)


def test_a_program_that_is_not_there_is_refused_before_any_work(tmp_path):
    recipe = recipe_of(tmp_path / "run", None, engine={"python": "nowhere/python"})
    with pytest.raises(EngineError, match=r"'nowhere/python', which is no program here"):
        train(recipe, quiet=True)
    with pytest.raises(EngineError, match="no program here"):
        build_cache(recipe, tmp_path / "cache", quiet=True)
    assert list(tmp_path.iterdir()) == []
