"""The model card of a run: YAML that is read back, numbers that are the run's, names that are no
markup; and the hub, which a fake stands for."""

import json
import shutil
import types

import pytest
import yaml
from conftest import tiny_recipe
from small_runs import EVALUATION, FAST

import potstill
from potstill.cli.app import main
from potstill.config import to_toml
from potstill.files import write_rows
from potstill.runs import run_folder
from potstill.runs.card import code, fenced, write_card
from potstill.runs.publish import push

HOSTILE = "a`b``|c\n---\n# <script>alert(1)</script> \u202e[x](y)"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with an evaluation and a validation."""
    out = tmp_path_factory.mktemp("card") / "run"
    validation = {"num_prompts": 4, "every": 4, "max_tokens": 8}
    recipe = tiny_recipe(out, **FAST, evaluation=EVALUATION, validation=validation)
    potstill.train(recipe, quiet=True)
    return out


def card_of(folder):
    """The front matter and the lines of the rest."""
    text = (folder / "model/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body.splitlines()


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({}, "the student itself, as it was at first"),
        (
            {"ema": 0.95, "prompt_template": "{prompt} A solution: {answer}"},
            "the student itself, as a moving average that keeps 0.95 of itself a step, with "
            "prompts of its own",
        ),
        ({"refresh_steps": 20}, "the student itself, as it was at first and after each 20 steps"),
    ],
)
def test_a_student_that_is_its_own_teacher_is_said_to_be(finished, tmp_path, teacher, said):
    shutil.copytree(finished, tmp_path / "run")
    sections = {"teacher": {"model": "self"} | teacher, "objective": {"prefix": "student"}}
    sections["data"] = {"source": "prompts.jsonl"}
    recipe = tiny_recipe(tmp_path / "run", **sections)
    (tmp_path / "run/recipe.toml").write_text(to_toml(recipe.resolved()))
    write_card(tmp_path / "run")
    assert f"| teacher | {said} |" in card_of(tmp_path / "run")[1]


def test_it_says_what_the_run_folder_holds(finished):
    front, lines = card_of(finished)
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["potstill", "distillation"],
    }
    assert "| teacher | `potstill:teacher` |" in lines and "| steps | 4 |" in lines
    rows = run_folder.read_rows(finished / "evals.jsonl")
    tables = [line for line in lines if line.startswith("| Avg@2 (%)")]
    assert len(tables) == len(rows) == 2
    for line, row in zip(tables, rows, strict=True):
        value, low, high = (f"{100 * end:.4g}" for end in row["avg"])
        assert line == f"| Avg@2 (%) | {value} | {low} to {high} |"
    (row,) = (row for row in run_folder.read_validations(finished) if row["step"] == 4)
    value, low, high = (f"{end:.4g}" for end in row["student_prefix_forward_kl"])
    shown = f"| forward KL on the student's text (nats) | {value} | {low} to {high} |"
    assert shown in lines
    assert "https://arxiv.org/abs/2605.16826" in "\n".join(lines)
    assert f'name = "{finished / "model"}"' in lines


def test_its_recipe_is_the_runs(finished, tmp_path):
    _, lines = card_of(finished)
    start = lines.index("```toml")
    stop = lines.index("```", start)
    (tmp_path / "recipe.toml").write_text("\n".join(lines[start + 1 : stop]))
    stored = potstill.load_recipe(finished / "recipe.toml")
    assert potstill.load_recipe(tmp_path / "recipe.toml").hash() == stored.hash()


def test_it_is_written_anew_by_an_evaluation(finished, capsys):
    before = card_of(finished)[1]
    main(
        f"evaluate {finished} --num-problems 3 --num-responses 3 --temperatures 0.9 "
        "--max-tokens 8".split()
    )
    after = card_of(finished)[1]
    assert not any("Avg@3" in line for line in before)
    assert any(line.startswith("| Avg@3 (%)") for line in after)
    assert any(line.startswith("| Avg@2 (%)") for line in after)


def test_one_prompt_has_no_interval(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    rows = run_folder.read_rows(folder / "validation.jsonl")
    write_rows(folder / "validation.jsonl", [row | {"num_prompts": 1} for row in rows])
    write_card(folder)
    lines = card_of(folder)[1]
    value = f"{rows[-1]['student_prefix_forward_kl'][0]:.4g}"
    assert f"| forward KL on the student's text (nats) | {value} | none |" in lines


@pytest.mark.parametrize(
    ("log", "key"),
    [("evals.jsonl", "num_problems"), ("evals.jsonl", "pass"), ("validation.jsonl", "max_tokens")],
)
def test_a_damaged_log_is_named(finished, tmp_path, log, key):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    rows = run_folder.read_rows(folder / log)
    del rows[0][key]
    write_rows(folder / log, rows)
    with pytest.raises(run_folder.RunError, match=f"{log}', line 1 has no '{key}'; restore it"):
        write_card(folder)


def test_names_are_code_and_nothing_else(finished, tmp_path):
    folder = tmp_path / "<b>run|`"
    (folder / "model").mkdir(parents=True)
    for name in ("recipe.toml", "environment.json", "metrics.jsonl"):
        (folder / name).write_text((finished / name).read_text())
    environment = json.loads((folder / "environment.json").read_text())
    environment["models"]["teacher"]["name"] = HOSTILE
    environment["models"]["student"]["name"] = "org/model\nlicense: mit"
    (folder / "environment.json").write_text(json.dumps(environment))
    write_card(folder)
    front, lines = card_of(folder)
    assert "base_model" not in front and "license" not in front
    (row,) = (line for line in lines if line.startswith("| teacher |"))
    assert row == ("| teacher | ``` a`b``\\|c --- # <script>alert(1)</script> \\u202e[x](y) ``` |")
    assert "# `` <b>run\\|` ``" in lines and "The student was not evaluated." in lines
    environment["models"]["student"]["name"] = "org/model"
    (folder / "environment.json").write_text(json.dumps(environment))
    write_card(folder)
    assert card_of(folder)[0]["base_model"] == "org/model"


def test_code_of_any_text_ends_where_it_should():
    assert code("a") == "`a`" and code("") == "` `" and code("a`") == "`` a` ``"
    assert fenced("toml", "a\n```\nb") == ["````toml", "a", "```", "b", "````"]


# -- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A client that takes uploads or fails; what it was asked."""
    import huggingface_hub

    asked = types.SimpleNamespace(calls=[], fails=False)

    class Api:
        def create_repo(self, repo_id, **options):
            asked.calls.append(("create", repo_id, options))
            return f"https://hub/{repo_id}"

        def upload_folder(self, **options):
            if asked.fails:
                raise OSError("503: the hub\nis away")
            asked.calls.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def test_a_push_is_private_and_of_the_model_alone(finished, hub):
    assert push(finished, "org/mine") == "https://hub/org/mine"
    (_, repo_id, options), (_, uploaded) = hub.calls
    assert (repo_id, options) == ("org/mine", {"private": True, "exist_ok": True})
    assert uploaded["folder_path"] == str(finished / "model")
    assert 'name = "org/mine"' in card_of(finished)[1]


def test_a_push_that_fails_loses_nothing_and_says_the_command(finished, hub, capsys):
    hub.fails = True
    command = ["train", str(finished / "recipe.toml"), "--push-to-hub", "org/mine"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "503: the hub is away" in last
    assert f"`potstill {' '.join(command)}` tries again" in last
    hub.fails = False
    main(command)
    assert capsys.readouterr().out.splitlines()[-1] == "pushed: https://hub/org/mine"
    assert run_folder.is_done(finished, potstill.load_recipe(finished / "recipe.toml"))


@pytest.mark.parametrize(
    ("repo_id", "token", "offline", "said"),
    [
        ("mine", "hf_x", False, "is 'mine'; give the owner and the name"),
        ("a/b/c", "hf_x", False, "give the owner and the name"),
        ("org/-x..y", "hf_x", False, "give the owner and the name"),
        ("org/mine", None, False, "no token of the hub; run `hf auth login`"),
        ("org/mine", "hf_x", True, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_any_work(
    tmp_path, hub, monkeypatch, capsys, repo_id, token, offline, said
):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(SystemExit) as ended:
        main(["train", "demo", "--out", str(tmp_path / "run"), "--push-to-hub", repo_id])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said in line
    assert not (tmp_path / "run").exists() and not hub.calls
