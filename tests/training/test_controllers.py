"""The forward weight's schedules and the length gate: by hand as a state machine, and end to
end."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import interrupted_at, make_model, tiny_recipe
from sampled import some

import potstill
from potstill.config import RecipeError, WeightSchedule, Window, make_recipe
from potstill.engines.native import NativeEngine
from potstill.rollouts.text import is_loop
from potstill.runs import run_folder
from potstill.training import probing
from potstill.training.controllers import (
    Probe,
    WeightState,
    WindowState,
    decide,
    first_window,
    is_probe_due,
    next_weight,
    rungs,
    scheduled_weight,
    scheduled_window,
)
from potstill.types import DataError

GOOD = Probe(
    entropy=1.0, teacher_entropy=None, truncation=0.1, teacher_truncation=0.0, repetition=0.0
)
FLAT = dataclasses.replace(GOOD, entropy=0.4)
CUT = dataclasses.replace(GOOD, truncation=0.6, teacher_truncation=0.2)
LOOPS = dataclasses.replace(GOOD, repetition=0.1)
GATED = Window(tokens=1024, schedule="entropy-gated", start=128)


def play(window, *probes):
    """Actions and windows of a sequence of probes."""
    state, seen = first_window(window), []
    for probe in probes:
        state, decision = decide(window, state, probe)
        seen.append((decision.action, decision.window))
    return seen, state


# -- the gate as a state machine
# ---------------------------------------------------------------------------------------


def test_it_climbs_with_patience_up_to_the_cap():
    seen, state = play(GATED, *[GOOD] * 8)
    # The first probe sets the reference; then two a window.
    expected = ["hold", "hold", "climb", "hold", "climb", "hold", "climb", "hold"]
    assert [action for action, _ in seen] == expected
    assert [window for _, window in seen] == [128, 128, 256, 256, 512, 512, 1024, 1024]
    assert not is_probe_due(GATED, state, 400, 1), "nothing can change at the cap"
    assert state.first_entropy == 1.0


@pytest.mark.parametrize(
    ("probe", "gate"), [(FLAT, "entropy"), (CUT, "truncation"), (LOOPS, "repetition")]
)
def test_each_gate_alone_freezes_for_good(probe, gate):
    seen, state = play(GATED, GOOD, GOOD, GOOD, probe, GOOD, GOOD, GOOD)
    assert seen[2:4] == [("climb", 256), ("freeze", 256)]
    assert all(window == 256 for _, window in seen[3:]) and state.frozen
    _, decision = decide(
        GATED, WindowState(tokens=256, num_passed=1, frozen=False, first_entropy=1.0), probe
    )
    assert (
        decision.failed == (gate,)
        and gate in str(decision)
        and decision.as_row()["failed"] == [gate]
    )
    assert not is_probe_due(GATED, state, 400, 1), "sticky"


def test_it_thaws_where_freezing_is_not_for_good():
    window = GATED.model_copy(update={"sticky": False})
    seen, state = play(window, GOOD, FLAT, GOOD, GOOD)
    assert (
        seen == [("hold", 128), ("freeze", 128), ("hold", 128), ("climb", 256)] and not state.frozen
    )


def test_it_steps_back_where_it_may():
    window = GATED.model_copy(update={"step_back": True, "sticky": False, "patience": 1})
    seen, state = play(window, GOOD, GOOD, GOOD, FLAT, FLAT, FLAT, GOOD)
    assert [w for _, w in seen] == [128, 256, 512, 256, 128, 128, 256]
    assert [a for a, _ in seen][3:6] == ["step back", "step back", "freeze"]
    assert is_probe_due(window, state, 50, 1)
    sticky, state = play(window.model_copy(update={"sticky": True}), GOOD, GOOD, FLAT, GOOD)
    assert [w for _, w in sticky] == [128, 256, 128, 128] and state.frozen
    # At the cap it may still have to go back.
    assert is_probe_due(window, WindowState(tokens=1024), 50, 1)


def test_a_failed_probe_starts_the_count_again():
    window = GATED.model_copy(update={"sticky": False})
    seen, _ = play(window, GOOD, GOOD, FLAT, GOOD, GOOD)
    assert [w for _, w in seen] == [128, 128, 128, 128, 256]


def test_thresholds_relative_to_the_first_probe_absolute_and_relative_to_the_teacher():
    state = WindowState(tokens=128, num_passed=0, frozen=False, first_entropy=2.0)
    probe = dataclasses.replace(GOOD, entropy=0.9, teacher_entropy=1.5)
    for reference, threshold in (("first", 1.0), ("absolute", 0.5), ("teacher", 0.75)):
        _, decision = decide(GATED.model_copy(update={"reference": reference}), state, probe)
        assert decision.threshold == threshold
        assert decision.failed == (("entropy",) if threshold > 0.9 else ())


def test_the_teachers_own_truncation_does_not_count():
    long_teacher = dataclasses.replace(GOOD, truncation=0.9, teacher_truncation=0.7)
    assert decide(GATED, WindowState(tokens=128), long_teacher)[1].failed == ()
    new, _ = decide(GATED, WindowState(tokens=128), long_teacher)
    assert new.teacher_truncation == 0.7
    climbed, _ = decide(
        GATED, WindowState(tokens=128, num_passed=1, frozen=False, first_entropy=1.0), long_teacher
    )
    assert climbed.tokens == 256 and climbed.teacher_truncation is None, (
        "another window cuts another share"
    )


def test_the_ladder():
    assert rungs(GATED) == (128, 256, 512, 1024)
    assert rungs(Window(tokens=1000, schedule="entropy-gated", start=300)) == (300, 600, 1000)
    assert rungs(Window(tokens=64, schedule="entropy-gated", start=64)) == (64,)
    assert rungs(Window(tokens=90, schedule="entropy-gated", start=10, ladder=(20, 90))) == (
        10,
        20,
        90,
    )


@pytest.mark.parametrize(
    ("reuse", "expected"), [(1, [0, 50, 100]), (3, [0, 51, 102]), (80, [0, 80])]
)
def test_probes_come_where_a_set_of_rollouts_begins(reuse, expected):
    state = WindowState(tokens=128)
    assert [
        step for step in range(0, 130, reuse) if is_probe_due(GATED, state, step, reuse)
    ] == expected
    assert not is_probe_due(Window(), state, 0, 1)


def test_linear_windows():
    window = Window(tokens=110, schedule="linear", start=10)
    assert [scheduled_window(window, step, 11) for step in range(12)] == [*range(10, 111, 10), 110]
    quick = window.model_copy(update={"over_steps": 3})
    assert [scheduled_window(quick, step, 11) for step in range(5)] == [10, 60, 110, 110, 110]


# -- the forward weight
# ------------------------------------------------------------------------------------------------


def test_schedules_by_hand():
    linear = WeightSchedule(schedule="linear", end_weight=0.2)
    assert [scheduled_weight(linear, 1.0, step, 5) for step in range(6)] == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 0.2]
    )
    cosine = WeightSchedule(schedule="cosine", end_weight=0.0, over_steps=5)
    expected = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    assert [scheduled_weight(cosine, 1.0, step, 99) for step in range(5)] == pytest.approx(expected)
    steps = WeightSchedule(schedule="steps", at_steps=((2, 0.7), (4, 0.1)))
    assert [scheduled_weight(steps, 0.9, step, 6) for step in range(6)] == [
        0.9,
        0.9,
        0.7,
        0.7,
        0.1,
        0.1,
    ]
    assert scheduled_weight(WeightSchedule(), 0.3, 5, 6) == 0.3


def test_the_entropy_controller_holds_rises_falls_and_keeps_its_bounds():
    mixing = WeightSchedule(schedule="entropy", floor=0.5, band=0.2, rate=0.1, bounds=(0.1, 0.6))
    state = next_weight(mixing, WeightState(0.3), 2.0, 9.0)
    # The first entropy is the unit; at it the weight falls, as it is above floor + band: by (2.0 -
    # 1.4) / 1.0 of 0.1.
    assert state == WeightState(pytest.approx(0.24), 2.0)
    for entropy, weight in (
        (1.2, 0.24),
        (1.0, 0.24),
        (1.4, 0.24),
        (0.5, 0.29),
        (0.0, 0.39),
        (0.0, 0.49),
    ):
        state = next_weight(mixing, state, entropy, 9.0)
        assert state.weight == pytest.approx(weight)
    for _ in range(5):
        state = next_weight(mixing, state, 0.0, 9.0)
    assert state.weight == 0.6
    for _ in range(9):
        state = next_weight(mixing, state, 5.0, 9.0)
    assert state.weight == 0.1
    absolute = mixing.model_copy(update={"reference": "absolute"})
    teacher = mixing.model_copy(update={"reference": "teacher"})
    assert next_weight(absolute, WeightState(0.3), 0.25, 9.0).weight == pytest.approx(0.35)
    assert next_weight(teacher, WeightState(0.3), 2.25, 9.0).weight == pytest.approx(0.35)


@pytest.mark.parametrize(
    "mixing",
    [
        {"schedule": "linear", "end_weight": 0.9},
        pytest.param({"schedule": "cosine", "end_weight": 0.9}, marks=pytest.mark.slow),
        pytest.param(
            {"schedule": "steps", "at_steps": [[1, 0.3], [3, 0.8]]}, marks=pytest.mark.slow
        ),
        {"schedule": "entropy", "floor": 1.5, "rate": 0.1},
    ],
)
def test_schedules_survive_a_resume(tmp_path, mixing):
    def recipe(name):
        objective = {"prefix": "student", "kl": "mixed", "forward_weight": 0.2}
        return tiny_recipe(
            tmp_path / name, objective=objective, weight_schedule=mixing, train={"steps": 6}
        )

    whole = potstill.train(recipe("whole"), quiet=True)
    with interrupted_at(3):
        potstill.train(recipe("stopped"), quiet=True)
    resumed = potstill.train(recipe("stopped"), quiet=True)
    rows = [run_folder.read_rows(run.folder / "metrics.jsonl") for run in (whole, resumed)]
    weights = [[row["forward_weight"] for row in each] for each in rows]
    assert weights[0] == weights[1] and weights[0][0] == 0.2 and len(set(weights[0])) > 2
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)
    for row in rows[0]:
        expected = (
            row["forward_weight"] * row["forward_kl"]
            + (1 - row["forward_weight"]) * row["reverse_kl"]
        )
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_no_jump_at_the_ends_of_the_weight(tmp_path):
    def first_row(name, objective):
        recipe = tiny_recipe(
            tmp_path / name, objective={"prefix": "teacher", **objective}, train={"steps": 1}
        )
        return potstill.train(recipe, quiet=True).metrics

    for end, kl in ((0.0, "reverse"), (1.0, "forward")):
        pure = first_row(kl, {"kl": kl})
        for weight in (end, abs(end - 1e-7)):
            mixed = first_row(f"{kl}{weight}", {"kl": "mixed", "forward_weight": weight})
            assert mixed["loss"] == pytest.approx(pure["loss"], rel=1e-6)
            assert mixed["grad_norm"] == pytest.approx(pure["grad_norm"], rel=1e-5)


# -- the gate in a run
# -------------------------------------------------------------------------------------------------

GATE = {
    "schedule": "entropy-gated",
    "tokens": 32,
    "start": 8,
    "check_every": 2,
    "num_probes": 16,
    "patience": 1,
}


def gated(out, window, **sections):
    objective = {"prefix": "student", "kl": "reverse"}
    train = {"steps": 12, "checkpoint_every": 1, "lr": 1e-4, **sections.pop("train", {})}
    return tiny_recipe(out, objective=objective, window=GATE | window, train=train, **sections)


def decisions(folder):
    return [
        (row["step"], row["action"], row["window"])
        for row in run_folder.read_rows(folder / "window.jsonl")
    ]


def test_a_healthy_run_reaches_the_cap(tmp_path, capsys):
    result = potstill.train(gated(tmp_path / "run", {}))
    assert decisions(result.folder) == [(1, "hold", 8), (3, "climb", 16), (5, "climb", 32)]
    windows = [row["window"] for row in run_folder.read_rows(result.folder / "metrics.jsonl")]
    assert windows == [8] * 2 + [16] * 2 + [32] * 8
    row = run_folder.read_rows(result.folder / "window.jsonl")[0]
    # Everybody is cut at 8 tokens, the teacher too; that is no reason to stop.
    assert (
        row["truncation"] > 0.9
        and row["teacher_truncation"] > 0.9
        and row["threshold"] == 0.5 * row["entropy"]
    )
    assert "before step 3: window climb, now 16: entropy" in capsys.readouterr().err
    flops = [r["flops"]["probe"] for r in run_folder.read_rows(result.folder / "metrics.jsonl")]
    assert [f > 0 for f in flops] == [True, False, True, False, True] + [False] * 7


def test_a_run_whose_entropy_collapses_freezes(tmp_path):
    """A teacher that is nearly certain of one token: reverse KL takes the student there."""
    student, teacher = make_model(seed=0), make_model(seed=1)
    with torch.no_grad():
        teacher.model.lm_head.weight.mul_(40)
    window, train = {"check_every": 5, "patience": 2}, {"steps": 30, "lr": 1e-2, "warmup_steps": 1}
    recipe = gated(tmp_path / "run", window, train=train, data={"num_prompts": 64})
    result = potstill.train(recipe, student=student, teacher=teacher, quiet=True)
    *_, last = run_folder.read_rows(result.folder / "window.jsonl")
    assert last["action"] == "freeze" and "entropy" in last["failed"] and last["window"] < 32
    assert last["entropy"] < last["threshold"]
    assert result.metrics["window"] == last["window"]


@pytest.mark.parametrize("stop_at", some([(3,), (2,), (5,)], every=3))
def test_the_gates_state_survives_a_resume(tmp_path, stop_at):
    window = {"reference": "teacher", "patience": 2}
    whole = potstill.train(gated(tmp_path / "whole", window), quiet=True)
    with interrupted_at(stop_at):
        potstill.train(gated(tmp_path / "stopped", window), quiet=True)
    resumed = potstill.train(gated(tmp_path / "stopped", window), quiet=True)
    for name in ("window.jsonl",):
        assert run_folder.read_rows(whole.folder / name) == run_folder.read_rows(
            resumed.folder / name
        )
    flops = [
        [row["total_flops"] for row in run_folder.read_rows(r.folder / "metrics.jsonl")]
        for r in (whole, resumed)
    ]
    assert flops[0] == flops[1]
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loop_after_the_answer_changes_the_entropy_of_all_tokens_but_not_the_gate(
    tmp_path, monkeypatch
):
    """The same rollouts with and without a tail that repeats the end of the answer."""
    recipe = gated(tmp_path / "run", {"tokens": 64, "start": 64})
    from potstill.models import distributed
    from potstill.training.setup import prepare

    world = distributed.start()
    setup = prepare(recipe, world)
    models = {"student": setup.student, "teacher": setup.teacher}
    engines = {who: NativeEngine(each.model) for who, each in models.items()}
    real, seen, entropies = probing.from_one, [], []
    ids = setup.student.tokenizer.encode("#12.", add_special_tokens=False)
    real_statistics = probing.fused_statistics

    def answered(tail):
        def write(*args):
            rollouts = []
            for rollout in real(*args):
                written = (
                    *rollout.completion_ids[:6],
                    *ids,
                    *(tail * (50 // max(len(tail), 1)) if tail else ()),
                )
                n = len(written)
                rollouts.append(
                    dataclasses.replace(
                        rollout,
                        completion_ids=written,
                        trained=(True,) * n,
                        writers=("student",) * n,
                    )
                )
            return rollouts

        return write

    def statistics(*args, **options):
        stats = real_statistics(*args, **options)
        entropies.append(stats.student_entropy_N.mean().item())
        return stats

    monkeypatch.setattr(probing, "fused_statistics", statistics)
    for tail in ((), (ids[-1],)):
        monkeypatch.setattr(probing, "from_one", answered(tail))
        entropies.clear()
        probe, _ = probing.probe_window(
            recipe,
            setup,
            engines,
            student=setup.student,
            state=WindowState(tokens=64, teacher_truncation=0.0),
            step=0,
            world=world,
        )
        seen.append((probe.entropy, sum(entropies) / len(entropies)))
    (plain, all_plain), (looped, all_looped) = seen
    assert looped == pytest.approx(plain, rel=1e-6)
    assert abs(all_looped - all_plain) > 0.1 * all_plain


def test_loops_are_told_from_prose():
    assert is_loop("so the answer is 12. " * 400) and is_loop(
        "a long and sensible beginning. " + "1" * 20_000
    )
    assert not is_loop("".join(str(i * i % 977) for i in range(3000))) and not is_loop("")


@pytest.mark.parametrize("prefix", ["teacher", "dataset"])
def test_the_gate_works_with_other_prefixes_and_a_cache(tmp_path, prefix):
    from potstill.cache.build import build_cache

    sections = {"data": {"source": "multiplication:persona"}} if prefix == "dataset" else {}
    objective = {"prefix": prefix, "kl": "forward"}
    build_cache(
        tiny_recipe("unused", objective=objective, window={"tokens": 32}, **sections),
        tmp_path / "cache",
        quiet=True,
    )
    for name, teacher in (("live", {}), ("cached", {"cache": str(tmp_path / "cache")})):
        recipe = tiny_recipe(
            tmp_path / name,
            objective=objective,
            window=GATE,
            teacher=teacher,
            train={"steps": 6},
            **sections,
        )
        result = potstill.train(recipe, quiet=True)
        assert [window for _, _, window in decisions(result.folder)][:3] == [8, 16, 32]


def test_probes_are_held_out(tmp_path):
    from potstill.models import distributed
    from potstill.training.setup import prepare

    setup = prepare(gated(tmp_path / "run", {}), distributed.start())
    assert len(setup.probes) == 16
    assert not {p.token_ids for p in setup.probes} & {p.token_ids for p in setup.prompts}
    with pytest.raises(DataError, match="none is left to train on"):
        prepare(gated(tmp_path / "run", {"num_probes": 64}), distributed.start())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"window": {"schedule": "linear", "tokens": 100}},
            r"window.start is 128, more than window.tokens = 100",
        ),
        (
            {"window": {"start": 4}},
            r"window.start is set but not read: window.schedule is \"fixed\"",
        ),
        (
            {"window": {"schedule": "entropy-gated", "tokens": 512, "ladder": [256]}},
            r"window.ladder is \[256\]; it must grow",
        ),
        ({"window": {"schedule": "linear", "ladder": [3]}}, "window.ladder is set but not read"),
        (
            {"weight_schedule": {"schedule": "linear"}},
            "weight_schedule.schedule is set but not read: objective.kl is",
        ),
        (
            {"objective": {"kl": "mixed"}, "weight_schedule": {"schedule": "steps"}},
            r"weight_schedule.at_steps is \[\]; give pairs",
        ),
        (
            {"objective": {"kl": "mixed"}, "weight_schedule": {"floor": 1.0}},
            r"weight_schedule.floor is set but not read: weight_schedule.schedule",
        ),
        (
            {
                "objective": {"kl": "mixed"},
                "weight_schedule": {"schedule": "entropy", "bounds": [0.6, 1.0]},
            },
            r"bounds is \[0.6, 1.0\]; they must be in order, between 0 and 1, with "
            r"objective.forward_weight = 0.5",
        ),
    ],
)
def test_bad_settings(data, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe(data)


def test_decisions_are_plain_data():
    _, decision = decide(GATED, WindowState(tokens=128), GOOD)
    row = json.loads(json.dumps(decision.as_row()))
    assert row["entropy"] == 1.0 and row["action"] == "hold" and row["window"] == 128
