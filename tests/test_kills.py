"""Every command killed over and over ends with the files of one that was never killed."""

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import OPD, SFT, SMALL, cache, command, differences, train
from forked import Ended, Forks, Trouble

pytestmark = pytest.mark.slow

GATE = {
    "window.schedule": "entropy-gated",
    "window.start": "4",
    "window.check-every": "2",
    "window.num-probes": "3",
}
GATE |= {"window.patience": "1", "window.threshold": "0.01", "window.max-truncation": "1"}
GATE |= {"window.max-repetition": "1"}
VALIDATION = {"validation.num-prompts": "3", "validation.every": "1", "train.keep-checkpoints": "2"}
VALIDATION |= {"validation.keep-best": "student_prefix_reverse_kl", "validation.patience": "2"}
MIXED = {"objective.prefix": "mixed"}
HANDOFF = {
    "objective.prefix-mix": "handoff",
    "objective.handoff-tokens": "2 6",
    "objective.kl": "jsd",
}
ENTROPY_MIXING = {
    "objective.kl": "mixed",
    "weight_schedule.schedule": "entropy",
    "weight_schedule.rate": "0.2",
}
ALL = 10**6
EVALUATE = {
    "num-problems": "6",
    "num-responses": "3",
    "max-tokens": "10",
    "batch-size": "4",
    "temperatures": "1.0 0.6",
}
REWARD = {"reward.weight": "1", "reward.group-size": "3", "train.prompts-per-step": "2"}
AGAIN = {"rollouts.reuse": "2", "train.checkpoint-every": "3", "reward.start-kl": "0.1"}

# The student is its own teacher, which reads something else.
SELF = {"teacher.model": "self", "teacher.refresh-steps": "3", "teacher.prompt-column": "hint"}
SELF |= {"data.source": "prompts.jsonl"}
HINTED = "".join(f'{{"prompt": "{10 + i:_>4}*2=", "hint": "{60 + i:_>4}*7="}}\n' for i in range(24))
STUDY = """
out = "study"
recipe = "demo"
[fields]
data.num_prompts = 16
train.steps = 4
train.warmup_steps = 0
train.prompts_per_step = 4
train.checkpoint_every = 2
window.tokens = 8
evaluation.num_problems = 2
evaluation.num_responses = 2
evaluation.max_tokens = 8
evaluation.temperatures = [1.0]
[[panels]]
title = "Natural"
models = ["potstill:base"]
[panels.sweep]
field = "train.lr"
values = [1e-3, 2e-3]
methods = ["sft"]
[[panels.groups]]
axes.method = ["sft", "opd"]
cache = true
[[panels.groups]]
axes.method = ["sft"]
fields.window.tokens = 6
[[panels.groups.then]]
fields.data.num_prompts = 16
fields.train.steps = 2
fields.train.prompts_per_step = 2
fields.reward.group_size = 3
fields.window.tokens = 8
[[panels.groups.judgements]]
label = "longer"
fields.max_tokens = 12
"""


@dataclass(frozen=True)
class Case:
    """A command; what must be there before it; how often it is killed at least, and how often in
    one trial at most.

    `at_each`: first of all it is killed at each of its first so many events, in trials of their
    own.
    """

    argv: list[str]
    before: tuple[list[str], ...] = ()
    kills: int = 13
    per_trial: int = 5
    at_each: int = 0
    files: dict[str, str] = field(default_factory=dict)


CASES = {
    "teacher": Case(train(SFT), at_each=8),
    "student": Case(train(OPD)),
    "dataset": Case(
        train(SFT, {"objective.prefix": "dataset", "data.source": "multiplication:persona"})
    ),
    "mixed by sequence": Case(train(MIXED, ENTROPY_MIXING, {"rollouts.reuse": "3"})),
    "mixed by handoff": Case(
        train(MIXED, HANDOFF, {"rollouts.reuse": "2", "train.checkpoint-every": "3"})
    ),
    "mixed by token": Case(train(MIXED, {"objective.prefix-mix": "token"})),
    "weight schedule": Case(
        train(
            OPD,
            {"objective.kl": "mixed", "weight_schedule.schedule": "linear", "rollouts.reuse": "4"},
            {"train.steps": "9"},
        )
    ),
    "from a cache": Case(train(SFT, {"teacher.cache": "cache"}), before=(cache(),)),
    "entropy-gated window": Case(train(OPD, GATE)),
    "validation": Case(train(OPD, VALIDATION)),
    "teacher self": Case(train(OPD, SELF), files={"prompts.jsonl": HINTED}),
    "gamma": Case(train(OPD, {"objective.gamma": "0.5"})),
    "reward alone": Case(command("train rl --out run", SMALL, REWARD, GATE), at_each=8),
    "reward and KL": Case(train(OPD, REWARD, AGAIN)),
    "cache of hidden states": Case([*cache(), "--completions", "2"], at_each=ALL),
    "cache of likeliest tokens": Case([*cache(), "--payload", "topk"], at_each=ALL),
    "cache of completions": Case([*cache(), "--payload", "completions"], at_each=ALL),
    "evaluate": Case(
        command("evaluate potstill:base --out evals.json --responses responses", EVALUATE)
    ),
    "evaluate a run": Case(command("evaluate run", EVALUATE), before=(train(SFT),), kills=6),
    "study": Case(
        ["study", "study.toml", "--jobs", "2", "--no-report"],
        kills=8,
        per_trial=4,
        files={"study.toml": STUDY},
    ),
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    loaded = Forks(tmp_path_factory.mktemp("forks"))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def totals(request):
    """Counts over all commands, printed when the last one has ended."""
    found: Counter[str] = Counter()
    yield found
    line = ", ".join(
        f"{found[name]} {name}" for name in ("kills", "trials", "equal", "differ", "not resumable")
    )
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{line} ({found['torn']} kills in the middle of a write)")


def moments(case: Case, rng: random.Random, whole: Ended) -> Iterator[list[Trouble]]:
    """When to kill the command in each trial, one time after the other; without end."""
    yield from ([Trouble(event=event)] for event in range(1, min(case.at_each, whole.events) + 1))
    while True:
        yield [draw(rng, whole, is_first=i == 0) for i in range(case.per_trial)]


def draw(rng: random.Random, whole: Ended, is_first: bool) -> Trouble:
    """A kill at an event, in the middle of a write after one, or at any moment."""
    kind = rng.choices(("event", "torn", "seconds"), (5, 4, 1))[0]
    if kind == "seconds":
        return Trouble(seconds=rng.uniform(0.1, 1) * whole.seconds)
    event = rng.randint(1, whole.events if is_first else max(whole.events // 2, 1))
    torn = rng.randint(1, rng.choice((40, 400, 60_000))) if kind == "torn" else None
    return Trouble(event=event, torn=torn)


def prepare(forks: Forks, case: Case, folder: Path) -> Path:
    """A folder with what the command needs."""
    folder.mkdir()
    for name, text in case.files.items():
        (folder / name).write_text(text)
    for argv in case.before:
        assert forks.run(folder, argv).code == 0
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_killed_command_ends_as_if_it_had_not_been(tmp_path, forks, totals, name):
    case, rng = CASES[name], random.Random(name)
    start = prepare(forks, case, tmp_path / "start")
    reference = shutil.copytree(start, tmp_path / "whole")
    whole = forks.run(reference, case.argv)
    assert whole.code == 0, whole.err
    found: Counter[str] = Counter()
    failed = []
    for planned in moments(case, rng, whole):
        folder = shutil.copytree(start, tmp_path / "trial")
        found["trials"] += 1
        tried: list[Trouble] = []
        for trouble in planned:
            tried.append(trouble)
            ended = forks.run(folder, case.argv, trouble)
            found["kills"] += ended.is_killed
            found["torn"] += ended.is_killed and trouble.torn is not None
            if not ended.is_killed:
                break
        ended = forks.run(folder, case.argv)
        wrong = differences(folder, reference) if ended.code == 0 else []
        outcome = "not resumable" if ended.code else "differ" if wrong else "equal"
        found[outcome] += 1
        if outcome != "equal":
            reason = ", ".join(wrong) or ended.last_line
            failed.append(
                f"{outcome}: {reason}; `potstill {' '.join(case.argv)}` after "
                f"{', '.join(map(str, tried))}"
            )
        shutil.rmtree(folder)
        if found["kills"] >= case.kills and found["trials"] >= min(case.at_each, whole.events):
            break
    totals.update(found)
    assert not failed, "\n".join(failed)
