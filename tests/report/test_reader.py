"""The rollout reader: its numbers against whole logits in float64, and its page in a browser
against hostile text."""

import dataclasses
import html
import json
import re
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import browsed, in_a_browser, make_model, make_rollout, tiny_recipe
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

import potstill
from potstill.cache.build import build_cache
from potstill.config import CacheOptions, Objective
from potstill.files import pack_data
from potstill.models.language_model import ASSETS, LanguageModel
from potstill.objectives.loss import Loss
from potstill.report.viewer import reader_data
from potstill.runs import run_folder
from potstill.runs.results import Entry
from potstill.training.rollout_log import NUM_CHOICES, scored_samples

CPU = torch.device("cpu")
# One unit of the last digit logged, and what float32 loses before it.
TOLERANCE = 2e-5
HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<!--",
    "-->",
    "<svg/onload=window.hacked=1>",
    "{{ 7 * 7 }}",
    "&lt;b&gt;",
    "'\"`${window.hacked=1}",
    "__proto__",
]
UNSEEN = {
    "\u2028": "⟨U+2028⟩",
    "\u202e": "⟨U+202E⟩",
    "\x00": "⟨U+0000⟩",
    "\u200b": "⟨U+200B⟩",
    "\n": "⏎",
    " ": "·",
}


def entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)


def check(sample, students: Tensor, teachers: Tensor, tokenizer, merged=()) -> None:
    """Compare a sample with both models' whole logits [N, V] in float64; `merged` ids are one class
    in the KLs."""
    both = [logits.log_softmax(-1) for logits in (students, teachers)]
    rest = [i for i in range(students.shape[1]) if i not in merged]
    q, p = (
        torch.cat([lp[:, rest], lp[:, list(merged)].logsumexp(-1, keepdim=True)], -1)
        if merged
        else lp
        for lp in both
    )
    expected = {
        "forward_kl": kl_div(q, p, log_target=True, reduction="none").sum(-1),
        "reverse_kl": kl_div(p, q, log_target=True, reduction="none").sum(-1),
        "student_entropy": entropy(q),
        "teacher_entropy": entropy(p),
    }
    for name, values in expected.items():
        assert sample[name] == pytest.approx(values.tolist(), abs=TOLERANCE), name
    ids = tokenizer.get_vocab()
    for who, log_probs in zip(("student", "teacher"), both, strict=True):
        likeliest = log_probs.exp().topk(NUM_CHOICES).values.tolist()
        assert len(sample[f"{who}_choices"]) == len(likeliest) > 0
        for n, (choices, probs) in enumerate(zip(sample[f"{who}_choices"], likeliest, strict=True)):
            assert [p for _, p in choices] == pytest.approx(probs, abs=TOLERANCE)
            for text, p in choices:
                assert p == pytest.approx(log_probs[n, ids[text]].exp().item(), abs=TOLERANCE), text


def check_shipped(row) -> tuple[Tensor, Tensor]:
    """Check a rollout of a run on the shipped pair, logged before its first update.

    Returns the log-probabilities [N] that student and teacher give to its tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "base")
    models = [
        AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float64)
        for name in ("base", "teacher")
    ]
    prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
    ids = prompt + tokenizer.convert_tokens_to_ids(row["tokens"])
    with torch.no_grad():
        students, teachers = (
            model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1] for model in models
        )
    check(row, students, teachers, tokenizer)
    written_N1 = torch.tensor(ids[len(prompt) :])[:, None]
    student_N, teacher_N = (
        z.log_softmax(-1).gather(1, written_N1)[:, 0] for z in (students, teachers)
    )
    return student_N, teacher_N


def test_numbers_are_those_of_the_initial_models_whole_logits(tmp_path):
    potstill.train(
        tiny_recipe(tmp_path / "run", objective={"prefix": "student", "kl": "reverse"}), quiet=True
    )
    rows = run_folder.read_rows(tmp_path / "run/samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 4, 4]
    for row in rows[:2]:
        check_shipped(row)
        assert (
            row["loss"] == pytest.approx(row["reverse_kl"], abs=TOLERANCE)
            and max(row["loss"]) > 0.1
        )
        assert row["temperature"] == 1.0 and row["kept"] is None


def test_scale_cap_temperature_cut_heads_and_end_ids_are_those_of_the_loss():
    """A soft-capped, scaled student; a teacher with more rows and another end; context in the
    middle of a rollout."""
    student, teacher = (
        make_model(seed=0),
        make_model(hidden_size=24, seed=1, vocab_size=29, eos_token_id=22),
    )
    student.model.config.final_logit_softcapping, student.model.config.logit_scale = 3.0, 0.5
    trained = (True, False, True, True, True)
    rollouts = [
        make_rollout([1, 5, 6], [7, 8, 9, 10, 2], trained),
        make_rollout([1, 4], [11, 12, 22]),
    ]
    objective = Objective(prefix="student", kl="forward", temperature=2.0)
    loss = Loss(objective=objective, normalize="token", vocab_size=23, end_class=(2, 22))
    samples = scored_samples(student, teacher, rollouts, loss, CPU)
    for rollout, sample in zip(rollouts, samples, strict=True):
        ids = torch.tensor([rollout.prompt.token_ids + rollout.completion_ids])
        mask = torch.tensor(rollout.trained)
        with torch.no_grad():
            rows = [
                m.double()(ids)[0, len(rollout.prompt.token_ids) - 1 : -1][mask]
                for m in (student, teacher)
            ]
        weights = [
            model.model.get_output_embeddings().weight[:23].double() for model in (student, teacher)
        ]
        students, teachers = (h @ weight.T for h, weight in zip(rows, weights, strict=True))
        students = 3.0 * torch.tanh(0.5 * students / 3.0)
        check(sample, students, teachers, student.tokenizer, merged=(2, 22))
        assert len(sample["loss"]) == sum(rollout.trained) and sample["trained"] == list(
            rollout.trained
        )
        # The loss is that of training, at its own temperature.
        assert sample["loss"] != pytest.approx(sample["forward_kl"], rel=0.05)
        student.float(), teacher.float()


STUDENT = {"prefix": "student", "kl": "reverse"}


def test_a_rollout_without_loss_tokens_has_no_numbers():
    student, teacher = make_model(seed=0), make_model(seed=1)
    rollouts = [make_rollout([1, 5], [7, 2], (False, False)), make_rollout([1, 4], [11, 12, 2])]
    loss = Loss(
        objective=Objective(prefix="student", kl="reverse"), normalize="token", vocab_size=23
    )
    none, all_ = scored_samples(student, teacher, rollouts, loss, CPU)
    for name in ("loss", "forward_kl", "teacher_entropy", "student_choices", "teacher_choices"):
        assert none[name] == [] and len(all_[name]) == 3


@pytest.mark.parametrize(
    "objective", [STUDENT, STUDENT | {"gamma": 0.9}, STUDENT | {"signal": "topk"}]
)
def test_samples_take_no_pass_of_either_model(tmp_path, monkeypatch, objective):
    """A step that logs rollouts computes as many hidden states as one that does not."""
    passes, forward = [], LanguageModel.forward

    def counted(model, input_ids):
        passes.append(len(input_ids))
        return forward(model, input_ids)

    monkeypatch.setattr(LanguageModel, "forward", counted)
    num_passes = []
    for num in (0, 2):
        monkeypatch.setattr("potstill.training.loop.NUM_LOGGED_SAMPLES", num)
        passes.clear()
        recipe = tiny_recipe(tmp_path / str(num), objective=objective, train={"steps": 1})
        potstill.train(recipe, quiet=True)
        rows = run_folder.read_rows(recipe.out / "samples.jsonl") if num else []
        assert len(rows) == num
        num_passes.append(list(passes))
    assert num_passes[0] == num_passes[1] and len(num_passes[0]) >= 4


@pytest.mark.parametrize(
    ("objective", "has_teacher"),
    [
        (STUDENT | {"signal": "topk", "top_k": 3}, True),
        (STUDENT | {"signal": "sampled", "estimator": "k1"}, True),
        (STUDENT | {"signal": "sampled", "estimator": "k1", "baseline": "exact"}, True),
        (STUDENT | {"gamma": 1.0}, True),
        ({"prefix": "teacher", "signal": "labels"}, False),
    ],
    ids=["topk", "sampled", "baseline", "gamma", "labels"],
)
def test_every_signal_logs_what_it_knows(tmp_path, objective, has_teacher):
    """And of its own tokens: batches are so small that the first rollouts are in the middle of a
    step's batches."""
    recipe = tiny_recipe(
        tmp_path / "run", objective=objective, train={"steps": 1, "tokens_per_batch": 64}
    )
    potstill.train(recipe, quiet=True)
    rows = run_folder.read_rows(tmp_path / "run/samples.jsonl")
    assert len(rows) == 2
    for row in rows:
        if not has_teacher:
            continue
        student_N, teacher_N = check_shipped(row)
        if objective.get("signal") == "sampled":
            assert row["loss"] == pytest.approx((student_N - teacher_N).tolist(), abs=TOLERANCE)
        elif "gamma" in objective:
            assert row["loss"] == pytest.approx(row["reverse_kl"], abs=TOLERANCE)
        else:
            # A KL over fewer classes.
            assert 0 < sum(row["loss"]) < sum(row["reverse_kl"])
    row = rows[0]
    numbers = {"loss", "student_entropy", "student_choices"}
    numbers |= (
        {"forward_kl", "reverse_kl", "teacher_entropy", "teacher_choices"} if has_teacher else set()
    )
    assert all(len(row[name]) == sum(row["trained"]) for name in numbers)
    assert ("teacher_choices" in row) == ("forward_kl" in row) == has_teacher
    (run,) = reader_data(
        [Entry(name="run", path=tmp_path, evals=[], recipe=recipe, samples=(row,))]
    )
    assert {name for name, _ in run["numbers"]} == {
        name for name in numbers if not name.endswith("_choices")
    }


def test_caches_log_what_they_hold(tmp_path):
    """Hidden states give the same as live; top-k the same tokens, at the cache's temperature, and
    lower bounds."""
    whole, few = (
        {"prefix": "teacher", "kl": "forward"} | more
        for more in ({}, {"signal": "topk", "top_k": 4})
    )
    hidden = CacheOptions(rollouts_per_shard=16, dtype="float32")
    rows = {}
    for name, objective, options in (
        ("hidden", whole, hidden),
        ("topk", few, dataclasses.replace(hidden, payload="topk")),
    ):
        data = {"num_prompts": 16}
        build_cache(
            tiny_recipe("unused", objective=objective, data=data),
            tmp_path / name,
            options,
            quiet=True,
        )
        cache = {"cache": str(tmp_path / name)}
        train = {"steps": 1}
        recipe = tiny_recipe(
            tmp_path / f"run-{name}", objective=objective, teacher=cache, train=train, data=data
        )
        potstill.train(recipe, quiet=True)
        rows[name] = run_folder.read_rows(recipe.out / "samples.jsonl")[0]
    hidden_row, topk_row = rows["hidden"], rows["topk"]
    assert hidden_row["tokens"] == topk_row["tokens"] and topk_row["kept"] == 4
    for mine, theirs in zip(hidden_row["forward_kl"], topk_row["forward_kl"], strict=True):
        assert theirs <= mine + TOLERANCE
    for mine, theirs in zip(
        hidden_row["teacher_choices"], topk_row["teacher_choices"], strict=True
    ):
        assert [p for _, p in theirs] == pytest.approx([p for _, p in mine[:4]], abs=1e-4)
    check_shipped(hidden_row)


def sample_of(tokens, step=1, **more) -> dict:
    """A logged rollout with made-up numbers."""
    num = len(tokens)
    numbers = {
        name: [0.1 * i for i in range(num)] for name in ("loss", "forward_kl", "student_entropy")
    }
    choices = {
        f"{who}_choices": [[[text, 0.5], ["other", 0.25]] for text in tokens]
        for who in ("student", "teacher")
    }
    about = {
        "prompt_id": "p",
        "prompt": "prompt",
        "writers": [["student", num]],
        "stop": "end",
        "trained": [True] * num,
    }
    return {
        "step": step,
        "tokens": list(tokens),
        "temperature": 1.0,
        "kept": None,
        **about,
        **numbers,
        **choices,
    } | more


def entry_of(*samples) -> Entry:
    return Entry(name="run", path=Path("runs/one"), evals=[], samples=samples)


def test_a_page_holds_first_and_last_steps_and_no_more_tokens_than_it_may():
    samples = [sample_of("abcdefgh"[: 2 * step], step) for step in (1, 1, 2, 3, 4)]
    (run,) = reader_data([entry_of(*samples), entry_of()])
    assert [one["step"] for one in run["rollouts"]] == [1, 1, 4] and run["num_steps"] == 4
    # 2 + 2 + 8 tokens: the long one alone is cut, to what is left of 9.
    (run,) = reader_data([entry_of(*samples)], max_tokens=9)
    assert [len(one["tokens"]) for one in run["rollouts"]] == [2, 2, 5]
    assert [one["num_tokens"] for one in run["rollouts"]] == [2, 2, 8]
    cut = run["rollouts"][2]
    assert len(cut["loss"]) == len(cut["trained"]) == len(cut["teacher_choices"]) == 5
    # 95 % of the values lie within a scale, whose end is a round number.
    assert run["scale"]["loss"] == pytest.approx(0.5)


def test_numbers_that_are_not_finite_break_no_page():
    sample = sample_of("ab") | {"reverse_kl": [float("inf"), float("nan")]}
    data = reader_data([entry_of(sample)])
    assert json.loads(json.dumps(data, allow_nan=False))[0]["rollouts"][0]["reverse_kl"] == [
        "inf",
        "nan",
    ]


def dumped(folder: Path, entries, script: str = "", head: str = "") -> str:
    """The DOM that a browser makes of the reader, after the scripts in it and after `script`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("potstill.report", "templates"), autoescape=True
    )
    environment.filters["packed"] = pack_data
    page = environment.from_string(
        "<!doctype html><meta charset=utf-8><title>page</title><body>{{ head | safe }}{% include "
        "'packed.html' %}{% include 'reader.html' %}<script>readerReady.then(() => { "
        "{{ script | safe }}\nsetTimeout(() => { "
        "document.body.dataset.hacked = String(window.hacked); }, 300); });</script>"
    )
    (folder / "page.html").write_text(
        page.render(reader=reader_data(entries), script=script, head=head)
    )
    return browsed(folder / "page.html")


def tokens_of(dom: str) -> list[str]:
    """The text of each token of the response, as a reader sees it."""
    found = re.findall(
        r'<span class="reader-token[^"]*" tabindex.*?>(.*?)</span>(?=<span '
        r'class="reader-token|</div>)',
        dom,
    )
    return [
        html.unescape(re.sub(r'<span class="reader-mark">(.*?)</span>', r"\1", text))
        for text in found
    ]


@in_a_browser
def test_what_models_write_is_text(tmp_path):
    tokens = [*HOSTILE, *UNSEEN]
    attack = "".join(HOSTILE)
    num = len(tokens)
    sample = sample_of(tokens, prompt=attack, prompt_id=attack, stop=attack, teacher_prompt=attack)
    # Each token's card is kept: what is shown on hover is in the page, too.
    script = """
        for (const token of document.querySelectorAll("#reader-response > .reader-token")) {
          token.click();
          document.body.append(document.getElementById("reader-card").cloneNode(true));
        }
    """
    dom = dumped(tmp_path, [dataclasses.replace(entry_of(sample), name=attack)], script)
    assert 'data-hacked="undefined"' in dom
    shown = tokens_of(dom.replace("\n", ""))
    assert shown == [*HOSTILE, *UNSEEN.values()]
    assert dom.count("reader-card") > num
    for text in HOSTILE:
        # In the response, in its own card three times (title, both choices) and in the prompts.
        assert dom.count(html.escape(text, quote=False)) >= 6, text
    assert "<img" not in dom and "<svg" not in dom
    for character in "\u2028\u202e\x00\u200b":
        assert character not in dom


@in_a_browser
def test_the_attack_works_where_nothing_is_escaped(tmp_path):
    """Else the test above could not fail."""
    assert 'data-hacked="1"' in dumped(tmp_path, [entry_of(sample_of("a"))], head=HOSTILE[1])


@in_a_browser
def test_colours_context_writers_and_keys(tmp_path):
    mixed = [["teacher", 2], ["student", 2]]
    first, last = (
        sample_of("abcd", 1),
        sample_of("wxyz", 9, writers=mixed, trained=[False, True, True, True]),
    )
    last |= {name: [0.0, 0.2, 0.4] for name in ("loss", "forward_kl", "student_entropy")}
    script = """
        const tokens = document.querySelectorAll("#reader-response > .reader-token");
        tokens[0].click();
        for (const key of ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"])
          tokens[0].dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    """
    dom = dumped(tmp_path, [entry_of(first, last)], script)
    tags = re.findall(r'<span class="(reader-token[^"]*)" tabindex="(.*?)" .*?--share: (.*?);', dom)
    assert [float(share) for _, _, share in tags] == [
        0.0,
        0.0,
        pytest.approx(0.4),
        pytest.approx(0.8),
    ]
    assert ["reader-context" in names for names, *_ in tags] == [True, False, False, False]
    assert ["reader-by-teacher" in names for names, *_ in tags] == [True, True, False, False]
    assert [tab for _, tab, _ in tags] == ["-1", "-1", "0", "-1"]
    card = dom[dom.index('id="reader-card"') : dom.index('id="reader-notes"')]
    assert "token 3 of 4, written by student" in card and "0.2000 nats" in card and "50.0 %" in card
    assert tokens_of(dom) == list("wxyz")
    assert len(re.findall('<option value="[01]">step', dom)) == 2 and "0.5 nats or more" in dom
