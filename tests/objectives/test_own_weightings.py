"""A weighting of the user's own: what it gives is used and recorded, and whatever is wrong with it
is one line before anything is written."""

import hashlib
from pathlib import Path

import pytest
from commands import OPD, refused, train
from conftest import interrupted_at, tiny_recipe
from small_runs import rows_of

import potstill
from potstill.cli.app import main
from potstill.runs.run_folder import read_json

# The built-in weighting "todi", by its definition.
WEIGHTS = """
from potstill import LossTerms, Tokens

def weights(tokens: Tokens, steepness: float = 1.0) -> LossTerms:
    stats = tokens.stats
    ratio = stats.teacher_log_prob_N - stats.student_log_prob_N
    forward = 1 / (1 + (-steepness * ratio).exp())
    return LossTerms(forward=forward, reverse=1 - forward)
"""
OWN = OPD | {"objective.kl": "mixed", "objective.weights": "my_weights.py:weights"}
SCORED = {"reward.source": "score.py:score"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with the weighting in it."""
    monkeypatch.chdir(tmp_path)
    Path("my_weights.py").write_text(WEIGHTS)
    Path("score.py").write_text("def score(examples, responses): return list(map(len, responses))")
    return tmp_path


def edit(old: str, new: str) -> None:
    """Replace a part of the file."""
    text = Path("my_weights.py").read_text()
    assert old in text
    Path("my_weights.py").write_text(text.replace(old, new))


def recipe(out: str, objective=None, **sections) -> potstill.Recipe:
    fixed = {"prefix": "student", "kl": "mixed", "weights": "my_weights.py:weights"}
    train = {"steps": 2, "checkpoint_every": 1} | sections.pop("train", {})
    return tiny_recipe(out, objective=fixed | (objective or {}), train=train, **sections)


def test_it_is_the_built_in_of_the_same_formula():
    own = potstill.train(recipe("own"), quiet=True)
    potstill.train(recipe("named", {"weights": "todi"}), quiet=True)
    potstill.train(recipe("steep", {"weights_arguments": {"steepness": 3.0}}), quiet=True)
    assert rows_of(Path("own")) == rows_of(Path("named"))
    assert rows_of(Path("steep"))[0]["loss"] != rows_of(Path("own"))[0]["loss"]
    digest = hashlib.sha256(Path("my_weights.py").read_bytes()).hexdigest()
    assert read_json(own.folder / "environment.json")["task_files"] == {"my_weights.py": digest}


def test_it_is_said_that_its_code_is_run(capsys):
    main(train(OWN, {"train.steps": "1"}))
    assert "the code of my_weights.py is run (SHA-256 " in capsys.readouterr().err


def test_a_resume_with_another_file(capsys):
    """It goes on, as with another task's file, and the change is said and recorded."""
    first = hashlib.sha256(Path("my_weights.py").read_bytes()).hexdigest()
    with interrupted_at(1):
        potstill.train(recipe("run"))
    edit("steepness * ratio", "2 * steepness * ratio")
    now = hashlib.sha256(Path("my_weights.py").read_bytes()).hexdigest()
    capsys.readouterr()
    potstill.train(recipe("run"))
    told = f"(SHA-256 {first[:16]}..., now {now[:16]}...)"
    assert f"my_weights.py has changed since the run began {told}" in capsys.readouterr().err
    environment = read_json(Path("run/environment.json"))
    assert environment["task_files"] == {"my_weights.py": now}
    (change,) = environment["changes"]
    assert change["task_files"] == {"my_weights.py": [first, now]}


def test_it_sees_what_the_run_has():
    """Whole rollouts of the batch, scores where there are some, and log-probabilities as they were
    when a rollout was new."""
    Path("my_weights.py").write_text(
        "from potstill import LossTerms\n"
        "seen = []\n"
        "def weights(tokens):\n"
        "    seen.append(tokens)\n"
        "    return tokens.terms.scaled(tokens.score_N * 0 + 1)\n"
    )
    sections = {
        "rollouts": {"reuse": 2},
        "reward": {"group_size": 4, "source": SCORED["reward.source"]},
    }
    train = {"lr": 3e-2, "warmup_steps": 0, "tokens_per_batch": 100_000, "prompts_per_step": 2}
    run = recipe("run", train=train, **sections)
    potstill.train(run, quiet=True)
    (module,) = {m for name, m in __import__("sys").modules.items() if is_own(name, m)}
    _, first, second = module.seen
    for tokens in (first, second):
        assert tokens.rollout_N.unique().tolist() == list(range(8))
        starts = tokens.is_last_N.roll(1)
        assert (tokens.position_N[starts] == 0).all() and starts.sum() == 8
        num = tokens.position_N[tokens.is_last_N] + 1
        # The score is the length in characters, here a character a token but for the end.
        assert ((tokens.score_N[tokens.is_last_N] - num).abs() <= 1).all()
        means = tokens.score_N[tokens.is_last_N].sort().values.mean()
        assert means == pytest.approx(tokens.group_score_N[tokens.is_last_N].mean().item())
        assert tokens.is_student_N.all()
    assert (first.sampling_log_prob_N == first.stats.student_log_prob_N).all()
    assert (second.sampling_log_prob_N == first.sampling_log_prob_N).all()
    assert (second.stats.student_log_prob_N != first.stats.student_log_prob_N).any()


def is_own(name, module) -> bool:
    return name.startswith("potstill_own_") and hasattr(module, "seen")


FAULTS = [
    (
        ("forward=forward,", "forward=forward[1:],"),
        "forward is a tensor [4]; give [5], one number a row",
    ),
    (("forward=forward,", "forward=forward / 0,"), "forward holds inf; give finite numbers"),
    (("steepness * ratio", "float('nan') * ratio"), "forward holds nan"),
    (
        ("forward=forward,", "forward=forward.requires_grad_(),"),
        "forward is a tensor with a gradient; weights are constants: detach it",
    ),
    (("forward=forward,", "forward=forward > 0.5,"), "give floating-point numbers"),
    (("forward=forward,", "forward='much',"), "forward is a str; give a number or a tensor"),
    (("return LossTerms", "return 1 or LossTerms"), "it returned int; return LossTerms"),
    (("return LossTerms", "LossTerms"), "it returned NoneType; return LossTerms"),
    (
        ("forward=forward,", "forward=forward, sideways=1,"),
        "line 8 raised TypeError: LossTerms.__init__() got an unexpected keyword argument",
    ),
    (
        ("stats = tokens.stats", "stats = 1 / 0"),
        "my_weights.py: weights: line 5 raised ZeroDivisionError: division by zero; mend the file",
    ),
    (("ratio = stats", "ratio = tokens.score_N + stats"), "line 6 raised TypeError"),
    (
        ("forward=forward,", "jsd=forward,"),
        "the term jsd has mixture_weight 0.5 and the call None; give both the same",
    ),
    (
        ("def weights", "def heights"),
        "my_weights.py has no function 'weights'; write it, or name another",
    ),
    (("import LossTerms", "import Terms"), "cannot be run: line 2 raised ImportError"),
    (("def weights", "def weights("), "my_weights.py, line 4 is no Python"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faults_of_the_function(capsys, change, message):
    edit(*change)
    refused(capsys, train(OWN), "my_weights.py", message)


SETTINGS = [
    ({"objective.weights": "none.py:weights"}, "none.py does not exist; give a Python file of"),
    (
        {"objective.weights": "my_weights.py"},
        "names no function; write it after the file, as in my_weights.py:weights",
    ),
    (
        {"objective.weights-arguments": "{above = 3}"},
        "raised TypeError: weights() got an unexpected keyword argument 'above'",
    ),
    (
        {"objective.weights-arguments": "{steepness = 'a'}"},
        "my_weights.py: weights: line 7 raised TypeError",
    ),
    # The likeliest tokens alone do not tell how likely the written one is.
    ({"objective.signal": "topk"}, "line 6 raised TypeError: unsupported operand type(s) for -"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_faults_of_the_recipe(capsys, settings, message):
    options = train(OWN)
    for name, value in settings.items():
        options += [f"--{name}", value]
    refused(capsys, options, message)


def test_a_term_that_the_signal_does_not_have(capsys):
    edit(
        "ratio = stats.teacher_log_prob_N - stats.student_log_prob_N",
        "return LossTerms(cross_entropy=1.0)",
    )
    message = "the term cross_entropy needs labels_N"
    refused(capsys, train(OWN, {"objective.signal": "topk"}), "my_weights.py", message)
    main(train(OWN, {"train.steps": "1"}))
