"""The claims on run folders whose truth is known."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import rewarded

from potstill.config import Recipe, make_recipe, to_toml
from potstill.files import append
from potstill.report.claims import claims, contrast, estimate_effect
from potstill.runs.results import read_entry, recipe_key
from potstill.runs.run_folder import mark_done

NUM_PROBLEMS, NUM_RESPONSES = 40, 8
EVALUATION = {
    "source": "multiplication",
    "num_problems": NUM_PROBLEMS,
    "num_responses": NUM_RESPONSES,
}
CELLS = {
    "sft": {"prefix": "teacher", "kl": "forward"},
    "dagger": {"prefix": "student", "kl": "forward"},
    "offline-rl": {"prefix": "teacher", "kl": "reverse"},
    "opd": {"prefix": "student", "kl": "reverse"},
}
# Accuracy that reinforcement learning adds to a start, where the claims are true, say nothing, and
# are false.
GAINS = {
    1: {"dagger": 0.15, "sft": 0.02, "offline-rl": -0.02, "opd": -0.1},
    0: dict.fromkeys(CELLS, 0.0),
    -1: {"dagger": -0.05, "sft": 0.4, "offline-rl": 0.02, "opd": 0.06},
}


def known(recipe, sign):
    """The facts of a run: all that is claimed (sign 1), its contrary (-1), or nothing (0)."""
    objective, window = recipe.objective, recipe.window
    weight = {"forward": 1.0, "reverse": 0.0, "mixed": objective.forward_weight}[objective.kl]
    is_student, is_safe = objective.prefix == "student", objective.kl == "mixed"
    is_long, is_gated = window.tokens == 256, window.schedule == "entropy-gated"
    better = (1 if recipe.train.flops is None else -1) * is_student + is_long + is_gated
    better += 2 if is_safe else 1 - weight
    return {
        "avg": 0.5 + 0.05 * sign * better - 0.01 * is_safe,
        "coverage": 0.2 + 0.15 * sign * weight,
        "entropy": 0.25 + sign * (0.05 if is_student else 0.03) * (2 * weight - 1),
        "length": 60 + 8 * sign * (is_long - is_gated - is_safe),
        "truncation": 0.1 + 0.03 * sign * is_long,
    }


def evaluated(truth, rng, model="run", **settings):
    """The rows of an evaluation, its problems drawn around the truth; cooled, all accuracies are
    half way to 0.5."""
    noise = 0.05 * np.random.default_rng(7).normal(size=NUM_PROBLEMS)
    noise += rng.normal(0, 0.002) + rng.normal(0, 0.02, NUM_PROBLEMS)
    columns = {
        "id": [f"test-{i}" for i in range(NUM_PROBLEMS)],
        "score": (truth["avg"] + noise).tolist(),
        "num_correct": rng.binomial(NUM_RESPONSES, truth["coverage"], NUM_PROBLEMS).tolist(),
        "length": (truth["length"] + 20 * noise).tolist(),
        "truncation": (truth["truncation"] + 0.1 * noise).tolist(),
        "entropy_before_answer": (truth["entropy"] + 0.1 * noise).tolist(),
    }
    settings = {
        "split": "test",
        "max_tokens": 128,
        "seed": 0,
        "end_ids": [1],
        **EVALUATION,
        **settings,
    }
    row = {
        "step": 10,
        "model": model,
        "num_problems": NUM_PROBLEMS,
        "num_responses": NUM_RESPONSES,
        "problems": columns,
        "settings": settings,
    }
    # The numbers of the whole evaluation are no part of a claim, which reads its problems.
    row |= {"avg": [0.5, 0.4, 0.6], "pass": {}, "levels": {}}
    # No claim is about anything else of cooled responses.
    cooled = {name: columns[name] for name in ("id", "num_correct")}
    cooled["score"] = [0.25 + score / 2 for score in columns["score"]]
    return [{**row, "temperature": 1.0}, {**row, "temperature": 0.6, "problems": cooled}]


def finished(recipe, rows, cost=1.0, entropy=0.25):
    """A finished run's folder."""
    recipe.out.mkdir(parents=True)
    (recipe.out / "recipe.toml").write_text(to_toml(recipe.resolved()))
    for step in (9, 10):
        row = {
            "step": step,
            "total_flops": 1e8 * cost * step,
            "seconds": 1.0,
            "teacher_entropy_before_answer": 0.25,
        }
        row["student_entropy_before_answer"] = entropy + 0.001 * (step % 2)
        append(recipe.out / "metrics.jsonl", row)
    for row in rows:
        append(recipe.out / "evals.jsonl", row)
    mark_done(recipe)
    return recipe.out


def make(out: Path, objective, seed=0, **sections) -> Recipe:
    sections["train"] = {"steps": 10, "seed": seed, **sections.get("train", {})}
    data = {
        "out": str(out),
        "objective": objective,
        "data": {"seed": seed},
        "evaluation": EVALUATION,
    }
    return make_recipe({**data, "window": {"tokens": 256}, **sections})


def make_rl(out: Path, start: Path | str, **train) -> Recipe:
    """Reinforcement learning from a run."""
    return make_recipe({"out": str(out), "evaluation": EVALUATION, **rewarded(start, **train)})


def write_study(folder, sign, seeds=(0, 1, 2)):
    """The folders of a study that feeds every claim, and its teacher's evaluation."""
    rng = np.random.default_rng(100 + sign)
    recipes = []
    for seed in seeds:
        for cell, objective in CELLS.items():
            recipes.append(make(folder / f"{cell}-{seed}", objective, seed))
            recipes.append(
                make(folder / f"{cell}-short-{seed}", objective, seed, window={"tokens": 64})
            )
            budget = {"train": {"flops": 1e9, "steps": 10 if cell == "opd" else 20}}
            recipes.append(make(folder / f"{cell}-budget-{seed}", objective, seed, **budget))
        for weight in (0.8, 0.9):
            mixed = {"prefix": "student", "kl": "mixed", "forward_weight": weight}
            recipes.append(make(folder / f"mixed-{weight}-{seed}", mixed, seed))
        gate = {"tokens": 256, "schedule": "entropy-gated", "start": 64}
        recipes.append(make(folder / f"gated-{seed}", CELLS["opd"], seed, window=gate))
        cached = {"teacher": {"cache": "cache"}, "train": {"lr": 1e-4}}
        recipes.append(make(folder / f"cached-{seed}", CELLS["sft"], seed, **cached))
    paths = []
    for recipe in recipes:
        cost = 2 + sign * (1 if recipe.objective.prefix == "student" else -0.5)
        truth = known(recipe, sign)
        paths.append(
            finished(recipe, evaluated(truth, rng), cost, truth["entropy"] + rng.normal(0, 0.002))
        )
    for seed in seeds:
        for cell, objective in CELLS.items():
            start = make(folder / f"{cell}-{seed}", objective, seed)
            end = known(start, sign)
            end["avg"] += GAINS[sign][cell]
            after = make_rl(folder / f"rl-{cell}-{seed}", start.out, seed=seed)
            paths.append(finished(after, evaluated(end, rng)))
    teacher = {"avg": 0.9, "coverage": 0.9, "entropy": 0.25, "length": 60, "truncation": 0}
    (folder / "teacher.json").write_text(json.dumps(evaluated(teacher, rng, "potstill:teacher")))
    return [*paths, folder / "teacher.json"]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folders = {sign: tmp_path_factory.mktemp(f"study{sign}") for sign in (1, 0, -1)}
    return {
        sign: [read_entry(path) for path in write_study(folder, sign)]
        for sign, folder in folders.items()
    }


def by_name(entries):
    return {claim.name: claim for claim in claims(entries)}


@pytest.mark.parametrize(("sign", "verdict"), [(1, "supported"), (-1, "contradicted")])
def test_what_is_true_is_found(studies, sign, verdict):
    found = claims(studies[sign])
    assert {claim.name: claim.verdict for claim in found} == {
        claim.name: verdict for claim in found
    }
    assert len({claim.name for claim in found}) == len(found) == 37
    for claim in found:
        assert claim.effect and claim.effect.low <= claim.effect.value <= claim.effect.high
        assert "3 seeds" in claim.detail and claim.pairs


@pytest.mark.parametrize(
    ("sign", "num_seeds", "direction", "verdict"),
    [(1, 1, "towards", "one seed"), (-1, 1, "against", "one seed"), (1, 2, "towards", "two seeds")],
)
def test_fewer_than_three_seeds_give_a_direction_and_no_verdict(
    studies, sign, num_seeds, direction, verdict
):
    """However far the interval is from the bound: of what is true, and of its contrary."""
    found = claims(
        [
            entry
            for entry in studies[sign]
            if not entry.recipe or int(entry.path.name[-1]) < num_seeds
        ]
    )
    assert {(claim.verdict, claim.direction) for claim in found} == {(verdict, direction)}
    assert {claim.answer for claim in found} == {f"{direction} ({verdict})"}
    assert all(verdict in claim.detail or "2 seeds" in claim.detail for claim in found)


def test_where_nothing_is_true_almost_nothing_is_found(studies):
    found = claims(studies[0])
    assert sum(claim.verdict in ("supported", "contradicted") for claim in found) <= 3
    assert all(claim.effect for claim in found)


def test_effects_are_those_that_were_put_in(studies):
    found = by_name(studies[1])
    for name, expected, tolerance in [
        ("accuracy-entropy: accuracy", 5, 0.6),
        ("accuracy-entropy: accuracy, cooled", 2.5, 0.3),
        ("accuracy-entropy: entropy", -(2 * 0.1 + 3 * 0.06) / 5, 0.002),
        ("quality-compute: cost, cached", 0.5, 1e-9),
        ("accuracy-stability: length", 8, 0.3),
        ("forward weight: entropy", 0.1, 0.005),
        ("RL: OPD start", -10, 1),
        ("RL: DAgger or OPD start", 20, 1),
    ]:
        assert found[name].effect.value == pytest.approx(expected, abs=tolerance), name


def test_pass_at_k_is_that_of_half_the_responses(tmp_path):
    rng = np.random.default_rng(0)
    means, entries = [], []
    for cell in ("offline-rl", "sft"):
        run = make(tmp_path / cell, CELLS[cell])
        rows = evaluated(known(run, 1), rng)
        # The share that holds a correct one, among 70 draws of four of eight responses.
        draws = list(itertools.combinations(range(NUM_RESPONSES), 4))
        hits = [
            sum(min(draw) < correct for draw in draws)
            for correct in rows[0]["problems"]["num_correct"]
        ]
        means.append(100 * np.mean(hits) / len(draws))
        entries.append(read_entry(finished(run, rows)))
    claim = by_name(entries)["accuracy-entropy: coverage"]
    assert claim.effect.value == pytest.approx(means[0] - means[1]) and "k = 4" in claim.detail


def test_every_claim_is_listed_when_there_are_no_runs(studies):
    for entries in ([], studies[1][:1], studies[1][-1:]):
        for claim in claims(entries):
            assert (claim.verdict, claim.effect, claim.pairs) == ("not measured", None, ())
            assert claim.detail.startswith("needs ")


@pytest.mark.parametrize(
    ("differing", "is_paired"),
    [
        ({"train": {"lr": 1e-4}}, True),
        ({"teacher": {"cache": "somewhere"}}, True),
        ({"train": {"loss_memory": 1, "checkpoint_every": 3, "tokens_per_batch": 512}}, True),
        ({"train": {"seed": 1}}, False),
        ({"data": {"seed": 1}}, False),
        ({"train": {"steps": 11}}, False),
        ({"teacher": {"model": "another"}}, False),
        ({"window": {"tokens": 200}}, False),
        ({"objective": {"prefix": "student", "kl": "reverse"}}, False),
        ({"objective": {"prefix": "teacher", "kl": "mixed", "forward_weight": 0.0}}, True),
        ({"objective": {"prefix": "teacher", "kl": "jsd"}}, False),
        ({"objective": {"prefix": "teacher", "kl": "reverse", "signal": "topk"}}, False),
    ],
)
def test_only_runs_that_agree_in_all_else_are_paired(tmp_path, differing, is_paired):
    rng = np.random.default_rng(0)
    sections = {"objective": CELLS["offline-rl"], **differing}
    runs = [make(tmp_path / "a", **sections), make(tmp_path / "b", CELLS["sft"])]
    truth = {"avg": 0.5, "coverage": 0.5, "entropy": 0.2, "length": 50, "truncation": 0}
    entries = [read_entry(finished(run, evaluated(truth, rng))) for run in runs]
    claim = by_name(entries)["accuracy-entropy: accuracy"]
    assert claim.pairs == (((tmp_path / "a", tmp_path / "b"),) if is_paired else ())
    if is_paired:
        assert "one seed: training noise is not in the interval" in claim.detail


@pytest.mark.parametrize("setting", [{"seed": 1}, {"max_tokens": 64}, {"num_problems": 41}])
def test_runs_that_were_evaluated_differently_are_not_paired(tmp_path, setting):
    rng = np.random.default_rng(0)
    entries = []
    for cell, settings in (("sft", {}), ("offline-rl", setting)):
        run = make(tmp_path / cell, CELLS[cell])
        entries.append(read_entry(finished(run, evaluated(known(run, 1), rng, **settings))))
    assert by_name(entries)["accuracy-entropy: accuracy"].verdict == "not measured"


def test_pairs_have_one_seed_and_are_the_folders(studies):
    for claim in claims(studies[1]):
        for first, second in claim.pairs:
            if second.name != "teacher.json":
                assert first.name[-1] == second.name[-1], claim.name
    found = by_name(studies[1])
    assert {(a.name, b.name) for a, b in found["RL: OPD start"].pairs} == {
        (f"rl-opd-{s}", f"opd-{s}") for s in range(3)
    }
    assert {(a.name, b.name) for a, b in found["RL: DAgger or SFT start"].pairs} == {
        (f"rl-dagger-{s}", f"rl-sft-{s}") for s in range(3)
    }
    assert {a.name for a, _ in found["accuracy-stability: collapse"].pairs} == {
        f"{name}-{s}" for name in ("opd", "opd-budget") for s in range(3)
    }
    # Runs to equal operations may end after different numbers of steps; those of equal steps may
    # not.
    assert ("opd-budget-0", "offline-rl-budget-0") in {
        (a.name, b.name) for a, b in found["quality-compute: equal operations"].pairs
    }


def test_a_start_may_be_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    start = make(tmp_path / "runs" / "opd", CELLS["opd"])
    after = make_rl(tmp_path / "rl", "runs/../runs/opd")
    entries = [read_entry(finished(run, evaluated(known(start, 1), rng))) for run in (start, after)]
    assert by_name(entries)["RL: OPD start"].pairs == (
        (tmp_path / "rl", tmp_path / "runs" / "opd"),
    )


def test_next_runs_that_differ_are_not_paired(tmp_path):
    rng = np.random.default_rng(0)
    entries = []
    for cell, steps in (("dagger", 10), ("sft", 20)):
        start = make(tmp_path / cell, CELLS[cell])
        runs = (start, make_rl(tmp_path / f"rl-{cell}", start.out, steps=steps))
        entries += [read_entry(finished(run, evaluated(known(start, 1), rng))) for run in runs]
    assert by_name(entries)["RL: DAgger or SFT start"].verdict == "not measured"


def test_a_next_distillation_is_no_reinforcement_learning(tmp_path):
    rng = np.random.default_rng(0)
    start = make(tmp_path / "opd", CELLS["opd"])
    after = make(tmp_path / "again", CELLS["sft"], student={"model": str(start.out)})
    entries = [read_entry(finished(run, evaluated(known(start, 1), rng))) for run in (start, after)]
    assert by_name(entries)["RL: OPD start"].verdict == "not measured"


@pytest.mark.parametrize("reward", [{"weight": 1.0}, {"start_kl": 0.1}])
def test_a_reward_beside_a_kl_is_another_method(tmp_path, reward):
    rng = np.random.default_rng(0)
    entries = []
    for cell in ("opd", "dagger"):
        run = make(tmp_path / cell, CELLS[cell], reward=reward)
        after = make_rl(tmp_path / f"rl-{cell}", run.out)
        for each in (run, after):
            entries.append(read_entry(finished(each, evaluated(known(run, 1), rng))))
    assert {claim.verdict for claim in claims(entries)} == {"not measured"}


@pytest.mark.parametrize(
    ("model", "settings", "gamma", "is_measured"),
    [
        ("potstill:teacher", {}, 0.0, True),
        ("another", {}, 0.0, False),
        ("potstill:teacher", {"max_tokens": 64}, 0.0, False),
        ("potstill:teacher", {}, 1.0, False),
    ],
)
def test_opd_is_compared_with_its_own_teacher(tmp_path, model, settings, gamma, is_measured):
    """And only with the reverse KL's local gradient is it the paper's OPD."""
    rng = np.random.default_rng(0)
    run = make(tmp_path / "opd", {**CELLS["opd"], "gamma": gamma})
    (tmp_path / "teacher.json").write_text(
        json.dumps(evaluated(known(run, 0), rng, model, **settings))
    )
    entries = [
        read_entry(finished(run, evaluated(known(run, 1), rng))),
        read_entry(tmp_path / "teacher.json"),
    ]
    pairs = by_name(entries)["accuracy-stability: collapse"].pairs
    assert pairs == (((tmp_path / "opd", tmp_path / "teacher.json"),) if is_measured else ())


def test_seeds_with_problems_of_their_own_are_not_mixed_up(tmp_path):
    """A task gives the problems of every seed the same ids, so ids alone would align them."""
    rng = np.random.default_rng(0)
    entries = []
    for seed in range(3):
        for cell in ("sft", "offline-rl"):
            run = make(tmp_path / f"{cell}-{seed}", CELLS[cell], seed)
            entries.append(read_entry(finished(run, evaluated(known(run, 1), rng, seed=seed))))
    claim = by_name(entries)["accuracy-entropy: accuracy"]
    assert "evaluated on different problems" in claim.detail and claim.verdict == "supported"


def test_contrasts_by_hand():
    assert contrast([1, 0, 0], "ends") == [1, -0.5, -0.5] and contrast([4, 9, 2], "ends") == [
        0,
        1,
        -1,
    ]
    assert contrast([4, 9, 9], "top") == [0, 0.5, 0.5]
    places, values = [0.0, 0.5, 0.8, 1.0], [0.3, 0.1, 0.5, 0.6]
    assert np.dot(contrast(places, "slope"), values) == pytest.approx(
        np.polyfit(places, values, 1)[0]
    )
    assert contrast([1, 1], "ends") is None and contrast([0, 1, 1], "slope") is None


def test_intervals_are_those_of_resampled_seeds_and_problems():
    """Twenty seeds under two conditions that share them: an independent bootstrap, seeds and
    problems drawn whole."""
    rng = np.random.default_rng(5)
    seeds, problems = rng.normal(0, 2, (20, 1)), rng.normal(0, 4, (1, 60))
    tables = [3 + shift + seeds + problems + rng.normal(0, 1, (20, 60)) for shift in (-1, 1)]
    effects = [[{str(p): table[s, p] for p in range(60)} for table in tables] for s in range(20)]
    table = sum(tables) / 2
    draws = [table[rng.integers(0, 20, 20)][:, rng.integers(0, 60, 60)].mean() for _ in range(4000)]
    found, over = estimate_effect(effects)
    assert (
        found.value == pytest.approx(table.mean()) and over == "interval over 20 seeds and problems"
    )
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.15)


@pytest.mark.parametrize("have_own_problems", [False, True])
def test_no_effect_is_found_one_time_in_twenty(have_own_problems):
    """Three seeds that differ, two conditions, forty problems, no effect on average."""
    rng = np.random.default_rng(6)
    num_trials, hits = 400, 0
    for _ in range(num_trials):
        problems, effects = rng.normal(0, 0.1, 40), []
        for s in range(3):
            problems = rng.normal(0, 0.1, 40) if have_own_problems else problems
            of_seed = rng.normal(0, 0.03)
            columns = [of_seed + problems + rng.normal(0, 0.1, 40) for _ in range(2)]
            names = [f"{s * have_own_problems} {p}" for p in range(40)]
            effects.append([dict(zip(names, column, strict=True)) for column in columns])
        found, _ = estimate_effect(effects)
        hits += not found.low <= 0 <= found.high
    assert hits / num_trials <= 0.075


def test_a_recipe_key_forgets_only_what_it_is_told(tmp_path):
    rng = np.random.default_rng(0)
    a, b = (
        read_entry(finished(run, evaluated(known(run, 1), rng)))
        for run in (
            make(tmp_path / "a", CELLS["sft"]),
            make(tmp_path / "b", CELLS["dagger"], train={"lr": 1e-4}),
        )
    )
    assert recipe_key(a, ["objective.prefix"]) != recipe_key(b, ["objective.prefix"])
    # The gates of engines are of students that write.
    differing = ["objective.prefix", "train.lr", "engine"]
    assert recipe_key(a, differing) == recipe_key(b, differing)
    assert json.loads(recipe_key(a, ["train"])).keys() == a.recipe.resolved().keys() - {
        "out",
        "train",
    }


def test_claims_do_not_wait_for_torch():
    program = (
        "import sys, potstill.report.claims; assert not {'torch', 'transformers'} & "
        "set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
