import pytest
import torch
from conftest import make_model

from potstill.config import Evaluation, RecipeError
from potstill.evaluation import evaluate, summarize
from potstill.metrics import num_tokens_to_answer, step_means, zlib_ratio
from potstill.models import load_model
from potstill.tasks.multiplication import Multiplication, build_tokenizer

SMALL = Evaluation(source="multiplication", num_problems=6, num_responses=4, temperatures=(1.0, 0.6))


def test_two_evaluations_with_one_seed_are_identical():
    def without_times(rows):
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    first, second = (without_times(evaluate("potstill:base", SMALL, quiet=True)) for _ in range(2))
    assert first == second
    other = SMALL.model_copy(update={"seed": 1})
    assert without_times(evaluate("potstill:base", other, quiet=True)) != first


def test_metrics_by_hand():
    problems = [
        {
            "score": 2,
            "correct": 2,
            "entropy": 8.0,
            "entropy_before_answer": 3.0,
            "tokens": 20,
            "tokens_before_answer": 10,
        },
        {
            "score": 0,
            "correct": 0,
            "entropy": 1.0,
            "entropy_before_answer": 1.0,
            "tokens": 10,
            "tokens_before_answer": 10,
        },
    ]
    for problem in problems:
        problem |= {"truncation": 1, "zlib_ratio": 4.0}
    row = summarize(problems, num_responses=4)
    assert row["avg"].value == pytest.approx(0.25)
    assert {k: round(v.value, 6) for k, v in row["pass"].items()} == {
        "1": 0.25,
        "2": round((1 - 1 / 6) / 2, 6),
        "4": 0.5,
    }
    assert row["entropy"].value == pytest.approx(9 / 30)
    assert row["entropy_before_answer"].value == pytest.approx(4 / 20)
    assert (row["length"].value, row["truncation"].value, row["zlib_ratio"].value) == pytest.approx((3.75, 0.25, 1.0))


def test_levels_average_to_the_whole():
    (row,) = evaluate("potstill:base", SMALL.model_copy(update={"temperatures": (1.0,)}), quiet=True)
    assert set(row["levels"]) == {"2 digits", "3 digits", "4 digits"}
    assert sum(level["avg"].value for level in row["levels"].values()) / 3 == pytest.approx(row["avg"].value)


def test_responses_are_graded_up_to_their_first_end_token():
    """A model that always answers, ends, and would go on: nothing after the end may count."""
    model = make_model()
    tokenizer = build_tokenizer()
    answer = Multiplication().examples("test", 6, 0)[3].answer
    pieces = [f"#{answer}.", "<eos>", "#99."]
    script = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]

    def scripted(input_ids, position_ids, **inputs):
        out = forward(input_ids=input_ids, position_ids=position_ids, **inputs)
        logits = torch.full_like(out.logits, -50.0)
        logits[:, -1, script[min(int(position_ids[0, -1]) - 7, len(script) - 1)]] = 50.0
        out.logits = logits
        return out

    forward, model.model.forward = model.model.forward, scripted
    (row,) = evaluate(model, SMALL.model_copy(update={"temperatures": (1.0,), "max_tokens": 32}), quiet=True)
    assert row["length"].value == len(f"#{answer}.") + 1 and row["truncation"].value == 0
    # One of the six problems has this answer, and the other answer comes after the end.
    assert row["avg"].value == pytest.approx(1 / 6)


def test_only_tasks_can_be_scored():
    with pytest.raises(RecipeError, match="only the responses of a task can be scored"):
        evaluate("potstill:base", Evaluation(source="file.jsonl"))
    with pytest.raises(RecipeError, match="None"):
        evaluate("potstill:base", Evaluation())


def test_shipped_teacher_and_base_are_as_good_as_they_should_be():
    """The shipped pair on held-out problems at T = 1: the teacher at least 85 %, the base 10 to 30 %."""
    settings = Evaluation(source="multiplication", num_problems=60, num_responses=8, temperatures=(1.0,), seed=1)
    assert evaluate("potstill:teacher", settings, quiet=True)[0]["avg"].value >= 0.85
    assert 0.10 <= evaluate("potstill:base", settings, quiet=True)[0]["avg"].value <= 0.30


def test_entropy_at_temperature_one_is_that_of_the_model():
    """Against a forward pass over the sampled text without a cache."""
    from potstill.config import Sampling
    from potstill.sampling import sample

    model = load_model("potstill:base")
    prompt = tuple(model.tokenizer.encode("__12*3="))
    (completion,) = sample(model.model, [prompt], [(0,)], max_tokens=40, end_ids=(2,), sampling=Sampling())
    ids = torch.tensor([prompt + completion.token_ids])
    log_probs = model.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = torch.distributions.Categorical(logits=log_probs).entropy()
    torch.testing.assert_close(torch.tensor(completion.entropies), expected, rtol=1e-4, atol=1e-4)


def test_tokens_up_to_the_answer():
    tokenizer, task = build_tokenizer(), Multiplication()
    ids = tokenizer.encode("7*6|#42.|:42|#42.", add_special_tokens=False)
    assert num_tokens_to_answer(ids, tokenizer.decode(ids), tokenizer, task.answer_end) == 8
    assert num_tokens_to_answer(ids[:7], tokenizer.decode(ids[:7]), tokenizer, task.answer_end) == 7
    assert num_tokens_to_answer(ids[:8], tokenizer.decode(ids[:8]), tokenizer, task.answer_end) == 8


def test_zlib_ratio_tells_a_loop_from_prose():
    assert zlib_ratio("abc" * 2000) > 10 > 3 > zlib_ratio("The quick brown fox jumps over the lazy dog.")
    assert zlib_ratio("") == 1.0


def test_step_means_by_hand():
    sums = {
        "num_loss_tokens": 10,
        "num_before_answer": 5,
        "student_entropy": 20.0,
        "student_entropy_before_answer": 5.0,
    }
    sums |= {"loss": 0.5, "num_rollouts": 2, "length": 12, "truncation": 1, "zlib_ratio": 3.0}
    assert step_means(sums) == {
        "loss": 0.5,
        "student_entropy": 2.0,
        "student_entropy_before_answer": 1.0,
        "length": 6.0,
        "truncation": 0.5,
        "zlib_ratio": 1.5,
        "num_loss_tokens": 10,
    }
