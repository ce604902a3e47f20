"""Validation: its numbers against plain softmaxes, the prompts it takes, and runs that are stopped
and go on."""

import json
import math
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import interrupted_at, make_model, make_rollout, tiny_recipe
from safetensors.torch import load_file
from sampled import some
from small_runs import kill, rows_of, weights_of

import potstill
from potstill.cli.show import print_results
from potstill.config import RecipeError, Validation, steps_between
from potstill.evaluation.quality import QUANTITIES, Pair, estimates, measure
from potstill.files import write_rows
from potstill.models import distributed
from potstill.models.language_model import load_model
from potstill.prompts.held_out import hold_out_of
from potstill.report.figures import style_at
from potstill.report.page import write_report
from potstill.report.validation import validation_curves
from potstill.runs.results import read_entry
from potstill.runs.run_folder import RunError
from potstill.runs.schema import ValidationRow
from potstill.statistics import Estimate
from potstill.training import checkpoint, loop, validation
from potstill.training.setup import prepare
from potstill.types import DataError, Example, Prompt

ON = {"num_prompts": 5, "every": 2}


def recipe_of(out, validation=ON, **sections):
    small = {"window": {"tokens": 8}, "data": {"num_prompts": 24}, "train": {"prompts_per_step": 4}}
    merged = {name: small.get(name, {}) | sections.get(name, {}) for name in {**small, **sections}}
    return tiny_recipe(out, validation=validation, **merged)


def validations(folder):
    return rows_of(folder, "validation.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps that validates before the first one and after each second."""
    return potstill.train(recipe_of(tmp_path_factory.mktemp("whole") / "run"), quiet=True).folder


def test_its_numbers_are_those_of_plain_softmaxes():
    """Float64, whole distributions, one completion at a time; the two end tokens are one class."""
    student, teacher = make_model(16, seed=0), make_model(24, seed=1, eos_token_id=22)
    texts = [([1, 5, 6], [7, 4, 4, 9, 15, 3, 8]), ([1, 5, 7], [6, 2]), ([1, 8, 8], [12, 3, 5, 22])]
    rollouts = [make_rollout(p, c, stop="end" if c[-1] in (2, 22) else "length") for p, c in texts]
    pair = Pair(
        student=student, teacher=teacher, vocab_size=23, end_class=(2, 22), tokens_per_batch=16
    )
    sums = [
        a | b
        for a, b in zip(
            measure(pair, "teacher", rollouts), measure(pair, "student", rollouts), strict=True
        )
    ]
    found = estimates(sums)

    def log_probs(model, prompt, completion):
        """Log-probabilities of the ids, end mass in the first of them, and of written tokens."""
        with torch.no_grad():
            logits = model.model.double()(input_ids=torch.tensor([prompt + completion])).logits
        rows = logits[0, len(prompt) - 1 : -1].softmax(-1)
        rows[:, 2] += rows[:, 22]
        rows = rows[:, :22].log()
        return rows, rows[range(len(completion)), [2 if i == 22 else i for i in completion]]

    wanted = dict.fromkeys(("forward", "reverse", "entropy", "student", "teacher"), 0.0)
    for prompt, completion in texts:
        mine, my_tokens = log_probs(student, prompt, completion)
        theirs, their_tokens = log_probs(teacher, prompt, completion)
        wanted["forward"] += (theirs.exp() * (theirs - mine)).sum().item()
        wanted["reverse"] += (mine.exp() * (mine - theirs)).sum().item()
        wanted["entropy"] -= (mine.exp() * mine).sum().item()
        wanted["student"] += my_tokens.sum().item()
        wanted["teacher"] += their_tokens.sum().item()
    means = {name: total / 13 for name, total in wanted.items()}
    assert found["teacher_prefix_forward_kl"].value == pytest.approx(means["forward"], rel=1e-5)
    assert found["student_prefix_reverse_kl"].value == pytest.approx(means["reverse"], rel=1e-5)
    assert found["student_entropy_before_answer"].value == pytest.approx(means["entropy"], rel=1e-5)
    assert found["teacher_log_prob"].value == pytest.approx(means["teacher"], rel=1e-5)
    assert found["student_perplexity"].value == pytest.approx(math.exp(-means["student"]), rel=1e-5)
    assert found["length"].value == pytest.approx(13 / 3) and found[
        "truncation"
    ].value == pytest.approx(1 / 3)
    assert all(low <= value <= high for value, low, high in found.values())
    assert found.keys() == QUANTITIES.keys() - {"score", "judged"}


def test_a_run_validates_at_both_ends_and_in_between(whole):
    found = validations(whole)
    assert [row["step"] for row in found] == [0, 2, 4] and {
        row["num_prompts"] for row in found
    } == {5}
    # The teacher does not learn, the student does.
    assert len({tuple(row["teacher_length"]) for row in found}) == 1
    assert len({tuple(row["student_prefix_reverse_kl"]) for row in found}) == 3
    assert all(QUANTITIES.keys() - {"judged"} <= row.keys() for row in found)
    quantities = get_type_hints(ValidationRow).keys() - {"step", "seconds"}
    assert quantities == QUANTITIES.keys() | {"num_prompts", "max_tokens"}


def test_it_changes_no_step(whole, tmp_path):
    without = potstill.train(recipe_of(tmp_path / "run", {"num_prompts": 0}), quiet=True).folder
    assert rows_of(without) == rows_of(whole) and not (without / "validation.jsonl").exists()
    assert all(
        torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(without).items()
    )


def test_a_stopped_run_goes_on_with_the_same_rows(whole, tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path / "run")
    with interrupted_at(3):
        potstill.train(recipe, quiet=True)
    assert [row["step"] for row in validations(tmp_path / "run")] == [0, 2]
    # The teacher's rollouts are there.
    real = validation.from_one
    monkeypatch.setattr(
        validation, "from_one", lambda who, *given: {"student": real}[who](who, *given)
    )
    potstill.train(recipe, quiet=True)
    assert validations(tmp_path / "run") == validations(whole)


def train_until_killed(out, event):
    """Killed when a row is written, before or after the checkpoint that knows of it is."""
    if event == "before":
        loop.is_exhausted = lambda trainer, run: kill() if run.step == 2 else False
    else:
        save = loop._save
        loop._save = lambda *given: (save(*given), kill())
    potstill.train(recipe_of(out), quiet=True)


@pytest.mark.parametrize("event", some([("after",), ("before",)], every=2))
def test_a_kill_loses_no_row_and_doubles_none(whole, tmp_path, forks, event):
    assert forks.call(tmp_path, train_until_killed, "run", event).is_killed
    assert len(validations(tmp_path / "run")) == 2
    potstill.train(recipe_of(tmp_path / "run"), quiet=True)
    assert validations(tmp_path / "run") == validations(whole)


def test_what_the_teacher_wrote_must_be_as_it_was_written(tmp_path):
    recipe = recipe_of(tmp_path / "run")
    with interrupted_at(3):
        potstill.train(recipe, quiet=True)
    path = tmp_path / "run/validation_teacher.json"
    path.write_text(path.read_text().replace('"stop": "length"', '"stop": "end"', 1))
    with pytest.raises(RunError, match="was changed after it was written; remove it"):
        potstill.train(recipe, quiet=True)
    path.unlink()
    potstill.train(recipe, quiet=True)


def test_two_ranks_find_what_one_does(tmp_path, forks):
    """Five prompts, which two ranks cannot share evenly."""
    arguments = (
        "train demo --train.steps 2 --train.prompts-per-step 4 --train.warmup-steps 0 "
        "--train.lr 1e-6"
    )
    arguments += (
        " --window.tokens 12 --data.num-prompts 16 --validation.num-prompts 5 "
        "--evaluation.num-problems 1"
    )
    arguments += " --evaluation.num-responses 1 --evaluation.max-tokens 4 --out"
    one = forks.run(tmp_path, [*arguments.split(), "one"])
    two = forks.run_ranks(tmp_path, [*arguments.split(), "two"], num_ranks=2)
    assert one.code == two.code == 0, one.err + two.err
    for a, b in zip(validations(tmp_path / "one"), validations(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        assert all(a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6) for name in a), (a, b)


@pytest.fixture
def scripted(monkeypatch):
    """Validations whose forward KL on the student's text is 3, 1, 2, 2, ... nats, whatever the
    student is."""
    real, values = validation.estimates, iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 0.5])

    def estimates_of(sums):
        return real(sums) | {"student_prefix_forward_kl": Estimate(next(values), 0.0, 9.0)}

    monkeypatch.setattr(validation, "estimates", estimates_of)


BEST = {"keep_best": "student_prefix_forward_kl", "every": 1, "num_prompts": 2}


def test_the_best_student_is_kept_and_patience_ends_the_run(tmp_path, scripted, capsys):
    train = {"steps": 8, "warmup_steps": 0, "checkpoint_every": 1, "keep_checkpoints": 3}
    recipe = recipe_of(tmp_path / "run", BEST | {"patience": 2}, train=train)
    # It is stopped when the best student is known to the log and the checkpoint.
    with interrupted_at(2):
        potstill.train(recipe, quiet=True)
    result = potstill.train(recipe)
    assert result.metrics["step"] == 3 and (tmp_path / "run/DONE").exists()
    said = capsys.readouterr().err
    assert (
        "ended early after step 3: 2 validations in a row had no better student_prefix_forward_kl"
        in said
    )
    assert [row["step"] for row in validations(tmp_path / "run")] == [0, 1, 2, 3]
    found = sorted(path.name for path in (tmp_path / "run/checkpoint").iterdir())
    assert found == ["step-000001", "step-000002", "step-000003"]
    saved = load_file(tmp_path / "run/checkpoint/step-000001/model.safetensors")
    best = load_file(tmp_path / "run/best/model.safetensors")
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in best.items())
    assert json.loads((tmp_path / "run/best/validation.json").read_text())["step"] == 1
    assert load_model(str(tmp_path / "run/best")).end_ids == result.student.end_ids
    # It is finished, and an extension begins to wait anew.
    assert potstill.train(recipe, quiet=True).metrics["step"] == 3
    assert potstill.train(recipe, extend_to=10, quiet=True).metrics["step"] == 5


def test_the_report_and_the_terminal_show_it(whole, tmp_path, capsys):
    """Numbers of the file, as the page's data and the table have them."""
    page = write_report([whole], tmp_path / "report.html")
    last = validations(whole)[-1]
    value, low, high = last["student_prefix_reverse_kl"]
    text = page.read_text()
    assert "On prompts that are not trained on" in text
    assert f"<td><span>{value:.4f}<br><small>[{low:.4f}, {high:.4f}]</small></span></td>" in text
    (run,) = json.loads((tmp_path / "results.json").read_text())["panels"][0]["runs"]
    assert [row["step"] for row in run["validations"]] == [0, 2, 4]
    styles = {whole: style_at(0, 0)}
    curves = validation_curves([read_entry(whole)], {whole: "a"}, styles, str)
    assert "reverse KL on the student's text (nats)" in [
        each["title"] for each in curves["figures"]
    ]
    (line,) = curves["runs"]
    shown = [line[end]["student_prefix_reverse_kl"][-1] for end in ("values", "low", "high")]
    assert line["steps"] == [0, 2, 4] and shown == pytest.approx([value, low, high], rel=1e-3)
    print_results([whole])
    said = capsys.readouterr().out
    assert "5 prompts not trained on" in said
    assert f"-> {value:.4f} [{low:.4f}, {high:.4f}]" in said


def test_a_best_student_that_no_checkpoint_knows_is_not_kept(tmp_path, scripted):
    recipe = recipe_of(tmp_path / "run", BEST, train={"checkpoint_every": 3})
    with interrupted_at(2):
        potstill.train(recipe, quiet=True)
    run = tmp_path / "run"
    assert (run / "checkpoint/best-000001").exists() and not (run / "best").exists()
    checkpoint.settle_best(run, None)
    assert not list((run / "checkpoint").iterdir())


def prompts_of(num):
    return [
        Prompt(example=Example(id=str(i), prompt="p"), token_ids=(1, i // 2)) for i in range(num)
    ]


def test_prompts_are_held_out_of_the_data():
    prompts = prompts_of(700)
    kept, held = hold_out_of(prompts, 16, is_default=True)
    ids = {prompt.token_ids for prompt in held}
    # Each stood there twice, and none is left in training.
    assert (
        len(ids) == len(held) == 16 and len(kept) == 668 and not ids & {p.token_ids for p in kept}
    )
    assert hold_out_of(prompts, 16) == (kept, held) and hold_out_of(prompts, 8)[1] == held[:8]
    with pytest.raises(
        DataError, match="16 prompts would be more than a twentieth of the 300 that there are"
    ):
        hold_out_of(prompts[:300], 16, is_default=True)
    with pytest.raises(
        DataError, match="takes 4 prompts out of 8, and none is left to train on; lower"
    ):
        hold_out_of(prompts[:8], 4)


@pytest.mark.parametrize("source", ["multiplication", "multiplication:persona"])
def test_problems_are_neither_trained_on_nor_evaluated(tmp_path, source):
    evaluation = {"source": source, "num_problems": 60, "num_responses": 1, "max_tokens": 1}
    sections = {"data": {"source": source, "num_prompts": 300}, "evaluation": evaluation}
    setup = prepare(recipe_of(tmp_path, **sections), distributed.start())
    assert setup.held_out is not None and setup.held_out.task is not None
    held = {prompt.example.prompt for prompt in setup.held_out.prompts}
    evaluated = {example.prompt for example in setup.held_out.task.examples("test", 60, 0)}
    assert (
        len(held) == 5
        and not held & evaluated
        and not held & {p.example.prompt for p in setup.prompts}
    )
    assert len(setup.prompts) == 300


def file_of(folder: Path, num: int, first: int = 0) -> str:
    path = folder / f"prompts-{num}-{first}.jsonl"
    write_rows(path, [{"prompt": f"{i:_>4}*2="} for i in range(first, first + num)])
    return str(path)


@pytest.mark.parametrize(
    ("num", "steps", "fields", "num_held", "said"),
    [
        (340, 120, {}, 16, "validation: 16 prompts, held out of the data, every "),
        (
            100,
            120,
            {},
            None,
            "no validation: 16 prompts would be more than a twentieth of the 100 that there are",
        ),
        (
            340,
            20,
            {},
            None,
            "no validation: the run is so short that it would take more than a twentieth of it",
        ),
        (5, 20, {}, None, "twentieth of it; validation.num_prompts = 2 asks for one"),
        (100, 20, {"num_prompts": 7}, 7, "every 2 steps; 7 prompts of the data are not trained on"),
        (100, 20, {"num_prompts": 0}, None, "first of 100 prompts"),
        (100, 20, {"source": "beside"}, 16, "every 2 steps"),
    ],
)
def test_how_many_prompts_are_held_out_is_said(tmp_path, num, steps, fields, num_held, said):
    source = file_of(tmp_path, num)
    if "source" in fields:
        fields = {"source": file_of(tmp_path, 20, first=500)}
    train = {"steps": steps, "prompts_per_step": 16}
    recipe = tiny_recipe(
        tmp_path, data={"source": source, "num_prompts": num}, train=train, validation=fields
    )
    setup = prepare(recipe, distributed.start())
    assert any(said in line for line in (*setup.notes, f"first of {len(setup.prompts)} prompts"))
    held = setup.held_out.prompts if setup.held_out is not None else None
    assert num_held == (None if held is None else len(held))
    assert len(setup.prompts) == num - (num_held or 0) * ("source" not in fields)


def test_an_extension_holds_out_what_was_held_out(tmp_path):
    """A short run has no validation, and a longer one would have: its prompts stay."""
    data = {"source": file_of(tmp_path, 340), "num_prompts": 340}
    longer = {"steps": 120, "prompts_per_step": 16}
    held_out = [
        prepare(tiny_recipe(tmp_path, data=data, train=train), distributed.start()).held_out
        for train in (longer, longer | {"extended": [[20, 20]]})
    ]
    assert held_out[0] is not None and held_out[1] is None


def test_what_cannot_be_validated_is_refused(tmp_path):
    source = file_of(tmp_path, 24)

    def refused(match, validation, **sections):
        sections = {"data": {"source": source}} | sections
        with pytest.raises(ValueError, match=match):
            prepare(recipe_of(tmp_path / "run", validation, **sections), distributed.start())

    refused("takes 24 prompts out of 24, and none is left", {"num_prompts": 24})
    refused("24 of 24 validation prompts are trained on too", {"source": source, "num_prompts": 24})
    refused(
        'keep_best is "score" and the prompts are of no task',
        {"num_prompts": 4, "keep_best": "score"},
    )
    refused(
        "validation.max_tokens = 900 is more than the context",
        {"num_prompts": 4, "max_tokens": 900},
    )
    refused(
        "patience is 3 and validation.keep_best names nothing", {"num_prompts": 4, "patience": 3}
    )
    refused("validation.every is set but not read", {"num_prompts": 0, "every": 3})


def test_the_default_takes_at_most_a_twentieth():
    for num_steps in (*range(1, 400), 1000, 5000, 10**6):
        for prompts_per_step in (1, 8, 48, 500):
            sizes = {
                "num_steps": num_steps,
                "prompts_per_step": prompts_per_step,
                "window": 64,
                "writes": True,
            }
            every = steps_between(Validation(), **sizes)
            if every is None:
                assert steps_between(Validation(num_prompts=16), **sizes) is not None
                continue
            # As dear as a step with as many rollouts; the teacher's writing like three.
            num = 1 + math.ceil(num_steps / every) + 3
            assert num * max(16 / prompts_per_step, 1) <= num_steps / 20


def test_a_cache_tells_of_its_own_prompts_alone(tmp_path):
    from potstill.cache.build import build_cache

    source, objective = file_of(tmp_path, 24), {"prefix": "teacher", "kl": "forward"}
    sections = {"data": {"source": source}, "objective": objective}
    recipe = recipe_of(tmp_path / "live", {"num_prompts": 4}, **sections)
    build_cache(recipe, tmp_path / "cache", quiet=True)
    live = potstill.train(recipe, quiet=True)
    sections["teacher"] = {"cache": str(tmp_path / "cache")}
    cached = potstill.train(
        recipe_of(tmp_path / "cached", {"num_prompts": 4}, **sections), quiet=True
    )
    mine, theirs = validations(cached.folder), validations(live.folder)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    assert "student_prefix_forward_kl" not in mine[0] and "teacher_log_prob" not in mine[0]
    assert {"teacher_prefix_forward_kl", "student_perplexity", "length", "truncation"} <= mine[
        0
    ].keys()
    with pytest.raises(RecipeError, match="cannot score what the student writes"):
        goal = {"num_prompts": 4, "keep_best": "student_prefix_reverse_kl"}
        prepare(recipe_of(tmp_path / "other", goal, **sections), distributed.start())
    shutil.rmtree(tmp_path / "cache")
