"""A teacher whose server tells log-probabilities alone: estimates and top-k losses are those of the
model here, and what it does not tell is refused."""

import json
import math

import pytest
import served
import torch
from conftest import make_rollout, tiny_recipe
from small_runs import rows_of

import potstill
from potstill.config import Objective, RecipeError, TeacherSpec
from potstill.models.language_model import load_model
from potstill.models.probe import ready
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.rollouts.batching import make_batches
from potstill.teachers.remote import servers
from potstill.teachers.remote.logprobs import read_log_probs
from potstill.teachers.remote.reach import fit_to_loss, reach
from potstill.types import ModelError, NonFiniteError
from potstill.wire import Answer

TEACHER, STUDENT = "potstill:stops-teacher", "potstill:stops-student"
CPU = torch.device("cpu")
# The two end in their own ways.
ENDS = (2, 23)
ROLLOUTS = [
    make_rollout([1, 5, 6], [9, 5, 2]),
    make_rollout([1, 7], [4, 4, 8, 9, 6, 23], trained=[True, False, *[True] * 4]),
    make_rollout([1, 7, 8], [2, 4, 23], trained=[True, True, False]),
    make_rollout([1], [3] * 11, stop="length"),
]


@pytest.fixture(scope="module")
def teacher():
    return ready(TEACHER).requires_grad_(False)


@pytest.fixture(scope="module")
def url(teacher):
    with served.that_answers(served.log_probs_of(teacher)) as url:
        yield url


def spec(url, **more) -> TeacherSpec:
    return TeacherSpec(model=TEACHER, url=url, protocol="logprobs", **more)


def found_by(student, teacher, objective, end_class):
    """The loss of each token, its sum, and the gradient of it."""
    loss = Loss(objective=objective, normalize="token", vocab_size=24, end_class=end_class)
    student.zero_grad()
    losses, sums = [], []
    for batch in make_batches(ROLLOUTS, tokens_per_batch=24):
        signal = teacher_signal(teacher, batch, loss)
        loss_sum, loss_N, _ = batch_loss(student, teacher, signal, batch, loss, 17)
        loss_sum.backward()
        losses.append(loss_N)
        sums.append(loss_sum.detach())
    gradient = torch.cat([weight.grad.flatten() for weight in student.parameters()])
    return torch.cat(losses), torch.stack(sums).sum(), gradient


def assert_alike(there, teacher, objective, end_class=()):
    student = load_model(STUDENT)
    here = found_by(student, teacher, objective, end_class)
    for a, b in zip(found_by(student, there, objective, end_class), here, strict=True):
        # The estimate k3 is a ratio of probabilities, and may be large.
        size = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a / size, b / size, rtol=1e-5, atol=1e-5)
    assert here[2].norm() > 1e-3


@pytest.mark.parametrize("end_class", [(), ENDS])
def test_estimates_are_those_of_the_model_here(url, teacher, end_class):
    """Also where an end token counts as either of both."""
    there = reach(spec(url), CPU)
    fit_to_loss(there, 24, end_class)
    for estimator, kl in (("k1", "reverse"), ("k2", "reverse"), ("k3", "forward")):
        objective = Objective(prefix="student", kl=kl, signal="sampled", estimator=estimator)
        assert_alike(there, teacher, objective, end_class)


@pytest.mark.parametrize("top_k", [1, 5, 64])
def test_top_k_losses_are_those_of_the_model_here(teacher, top_k):
    """Up to all 24 tokens, where there is no tail."""
    with served.that_answers(served.log_probs_of(teacher, most=24)) as url:
        there = reach(spec(url), CPU, top_k=top_k)
        for kl in ("forward", "reverse", "mixed", "jsd", "skew-reverse"):
            objective = Objective(prefix="dataset", kl=kl, signal="topk", top_k=top_k)
            assert_alike(there, teacher, objective)


def test_a_tail_that_is_rounded_away_is_the_least_there_is(teacher):
    """Kept probabilities of exactly 1, whose rest no number of the answer holds."""

    def sure(asked):
        told = [[None, *[{str(i): {"logprob": 0.0}} for i in ids[1:]]] for ids in asked["prompt"]]
        choices = [{"index": i, "prompt_logprobs": each} for i, each in enumerate(told)]
        return 200, {}, json.dumps({"choices": choices}).encode()

    with served.that_answers(sure) as url:
        signal = reach(spec(url), CPU, top_k=1).signal_at(make_batches(ROLLOUTS, 999)[0])
    assert signal.tail_log_prob_N.unique().tolist() == [pytest.approx(math.log(2.0**-23))]


def test_a_run_has_the_losses_of_one_with_the_model_here(tmp_path, url):
    """Estimates, with several batches a step and with rollouts that are logged."""
    pair = {"student": {"model": STUDENT}, "validation": {"num_prompts": 0}}
    pair["objective"] = {"prefix": "student", "kl": "reverse", "signal": "sampled"}
    pair["train"] = {"steps": 2, "tokens_per_batch": 64}
    there = {"url": url, "protocol": "logprobs"}
    for name, where in (("here", {}), ("there", there)):
        recipe = tiny_recipe(tmp_path / name, teacher={"model": TEACHER} | where, **pair)
        potstill.train(recipe, quiet=True)
    here, there = rows_of(tmp_path / "here"), rows_of(tmp_path / "there")
    assert [row["loss"] for row in there] == pytest.approx([row["loss"] for row in here], abs=1e-5)
    assert "forward_kl" in here[0] and "forward_kl" not in there[0]
    assert there[0]["flops"]["teacher"] == 0
    (sample, *_) = rows_of(tmp_path / "there", "samples.jsonl")
    assert "teacher_choices" not in sample and sample["kept"] is None


def test_a_run_with_the_likeliest_tokens(tmp_path, url, capsys):
    """End tokens are apart. Validation is of the student alone, and no entropy of the teacher is
    known."""
    recipe = tiny_recipe(
        tmp_path,
        student={"model": STUDENT},
        teacher={"model": TEACHER, "url": url, "protocol": "logprobs"},
        objective={
            **{"prefix": "student", "kl": "reverse", "signal": "topk"},
            **{"top_k": 8, "end_class": "raw"},
        },
        validation={"num_prompts": 8, "every": 2, "keep_best": "score"},
    )
    potstill.train(recipe)
    row = rows_of(tmp_path)[-1]
    assert row["reverse_kl"] > 0 and "teacher_entropy" not in row
    assert "student_prefix_reverse_kl" not in rows_of(tmp_path, "validation.jsonl")[0]
    assert "KL fwd" in capsys.readouterr().err


def changed(answer, change):
    """An answer with the log-probabilities of each row changed, where there are several tokens."""

    def answers(asked):
        status, headers, body = answer(asked)
        found = json.loads(body)
        found["choices"] = [change(choice) for choice in found["choices"]]
        return status, headers, json.dumps(found).encode()

    return answers


def with_rows(change):
    return lambda choice: choice | {"prompt_logprobs": change(choice["prompt_logprobs"])}


def at_third(change):
    """The third place alone changed, by a function of its log-probabilities by id."""

    def of_row(row):
        values = {i: each["logprob"] for i, each in row[2].items()}
        told = {i: {"logprob": value} for i, value in change(values).items()}
        return [*row[:2], told, *row[3:]]

    return with_rows(of_row)


FAULTS = {
    "too short": (with_rows(lambda row: row[:-1]), ModelError, "gave log-probabilities of"),
    "none": (lambda choice: {"index": choice["index"]}, ModelError, "without prompt_logprobs"),
    "null": (with_rows(lambda row: None), ModelError, "gave log-probabilities of"),
    "a place is missing": (with_rows(lambda row: [None] * len(row)), ModelError, "gave None for"),
    "of other ids": (at_third(lambda values: {"7": -1.0, "8": -2.0}), ModelError, "asked for was"),
    "too few": (at_third(lambda values: dict([*values.items()][:1])), ModelError, "asked for was"),
    "of an id that is none": (
        at_third(lambda values: values | {"24": -9.0}),
        ModelError,
        "teacher.model has 24 tokens",
    ),
    "of a word": (at_third(lambda values: values | {"the": -9.0}), ModelError, "gave {"),
    "not finite": (
        at_third(lambda values: dict.fromkeys(values, math.nan)),
        NonFiniteError,
        "not finite",
    ),
    "positive": (
        at_third(lambda values: dict.fromkeys(values, 0.3)),
        ModelError,
        "up to 0.3 that are no log-probabilities",
    ),
    "enormous": (
        at_third(lambda values: dict.fromkeys(values, 1e9)),
        ModelError,
        "no log-probabilities",
    ),
    "no float at all": (
        at_third(lambda values: dict.fromkeys(values, 10**400)),
        ModelError,
        "gave {",
    ),
    "logits": (
        at_third(lambda values: dict.fromkeys(values, -0.1)),
        ModelError,
        "add up to more than 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_not_what_was_asked_for(teacher, fault):
    change, error, says = FAULTS[fault]
    rows, right = [[1, 5, 6, 9], [1, 7, 2]], served.log_probs_of(teacher)
    asked = {"prompt": rows, "prompt_logprobs": 4}
    read_log_probs(Answer(*right(asked)), rows, 4, 24, "the URL")
    with pytest.raises(error, match=says) as raised:
        read_log_probs(Answer(*changed(right, change)(asked)), rows, 4, 24, "the URL")
    assert "the URL" in str(raised.value) and "\n" not in str(raised.value)


def test_a_server_that_keeps_fewer_says_what_to_do(url):
    says = r"greater than max allowed: 20.*--max-logprobs 21, or lower objective.top_k"
    with pytest.raises(ModelError, match=says):
        reach(spec(url), CPU, top_k=21)


def test_a_server_of_states_is_named(teacher):
    from potstill.serving.app import make_app

    with (
        served.in_a_thread(make_app(teacher, "print")) as url,
        pytest.raises(ModelError, match="refuses /v1/completions with prompt_logprobs"),
    ):
        reach(spec(url), CPU)


def test_a_server_that_disagrees_with_itself_is_refused(teacher):
    """Numbers depend on what else is asked for, as of a server with a fault in its batching."""
    right = served.log_probs_of(teacher)
    wrong = changed(right, at_third(lambda values: {i: 2 * each - 1 for i, each in values.items()}))

    def confused(asked):
        return (right if len(asked["prompt"]) == 1 else wrong)(asked)

    with (
        served.that_answers(confused) as url,
        pytest.raises(ModelError, match="disagrees with itself"),
    ):
        reach(spec(url), CPU)


def test_a_busy_server_is_asked_again(monkeypatch, teacher, url):
    """Of two servers one is busy half of the time, and cut short at others."""
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)
    numbers, right = iter(range(10**6)), served.log_probs_of(teacher)

    def sometimes(asked):
        number = next(numbers)
        status, headers, body = right(asked)
        if number % 3 == 1:
            return 503, {}, b"busy"
        return status, headers | ({"cut": "40"} if number % 3 == 2 else {}), body

    batches = make_batches(ROLLOUTS, tokens_per_batch=24)
    with served.that_answers(sometimes) as broken:
        there, calm = reach(spec((broken, url)), CPU), reach(spec(url), CPU)
        there.expect(batches)
        for batch in batches:
            assert torch.equal(there.signal_at(batch).log_prob_N, calm.signal_at(batch).log_prob_N)


def test_what_the_loss_is_over_is_told(url):
    with pytest.raises(ModelError, match=r'one class in the loss.*objective.end_class = "raw"'):
        fit_to_loss(reach(spec(url), CPU, top_k=4), 24, ENDS)
    with pytest.raises(ModelError, match="of all its 24 tokens, and the likeliest may be beyond"):
        fit_to_loss(reach(spec(url), CPU, top_k=4), 23, ())
    fit_to_loss(reach(spec(url), CPU), 23, ENDS)


def test_a_server_of_short_texts_limits_the_prompts(teacher):
    """One token is written after each, so that one less is read."""
    answers = served.log_probs_of(teacher)
    with served.that_answers(answers, max_model_len=40) as short:
        assert reach(spec(short), CPU).context_length == 39
    with (
        served.that_answers(answers, max_model_len="many") as odd,
        pytest.raises(ModelError, match="is no server of one model"),
    ):
        reach(spec(odd), CPU)


REFUSED = [
    ({"objective": {"signal": "full"}}, "takes whole distributions"),
    ({"objective": {"prefix": "teacher", "signal": "topk"}}, "does not write"),
    ({"objective": {"prefix": "mixed", "signal": "topk"}}, "does not write"),
    ({"objective": {"temperature": 2.0}, "sampling": {"temperature": 2.0}}, "made anew; use 1"),
    ({"objective": {"baseline": "exact"}}, r'objective.baseline is "exact"'),
    ({"objective": {"weights": "my.py:weights"}}, "may read the teacher's entropy"),
    (
        {"objective": {"signal": "topk", "kl": "mixed", "weights": "entropy-aware"}},
        "may read the teacher's entropy",
    ),
    (
        {
            "objective": {"signal": "topk", "kl": "mixed"},
            "weight_schedule": {"schedule": "entropy"},
        },
        "reads the teacher's",
    ),
    ({"window": {"schedule": "entropy-gated", "start": 8, "reference": "teacher"}}, "not known"),
    ({"teacher": {"wire_dtype": "bfloat16"}}, 'its protocol is "logprobs"'),
    ({"teacher": {"dtype": "bfloat16"}}, 'its protocol is "logprobs"'),
    ({"teachers": [{"name": "b", "model": "start"}]}, "which is of one teacher"),
]


@pytest.mark.parametrize(("sections", "says"), REFUSED)
def test_what_it_does_not_tell_is_refused_by_the_recipe(tmp_path, sections, says):
    given = {"teacher": {"url": "http://127.0.0.1:1", "protocol": "logprobs"}}
    given["objective"] = {"prefix": "student", "kl": "reverse", "signal": "sampled"}
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section if isinstance(section, dict) else section
    with pytest.raises(ValueError, match=says):
        tiny_recipe(tmp_path, **given)


def test_beside_others_and_in_a_cache_whole_distributions_are_wanted(tmp_path):
    there = {"model": TEACHER, "url": "http://127.0.0.1:1", "protocol": "logprobs"}
    with pytest.raises(ValueError, match='"b" with protocol = "logprobs"'):
        tiny_recipe(tmp_path, objective={"prefix": "student"}, teachers=[there | {"name": "b"}])
    objective = {"prefix": "dataset", "signal": "topk", "end_class": "raw"}
    with pytest.raises(RecipeError, match="a cache is made of hidden states"):
        recipe = tiny_recipe(tmp_path, teacher=there, objective=objective)
        potstill.build_cache(recipe, tmp_path / "cache")


def test_goals_of_validation_that_take_a_whole_distribution_are_refused(tmp_path, url):
    recipe = tiny_recipe(
        tmp_path,
        student={"model": STUDENT},
        teacher={"model": TEACHER, "url": url, "protocol": "logprobs"},
        objective={"prefix": "student", "kl": "reverse", "signal": "sampled"},
        validation={"num_prompts": 8, "every": 2, "keep_best": "student_prefix_forward_kl"},
    )
    with pytest.raises(RecipeError, match="no whole distribution is known"):
        potstill.train(recipe, quiet=True)
