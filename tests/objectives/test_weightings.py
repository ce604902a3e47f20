"""Weightings by name: each against its closed form on whole logits in float64, with its weights
frozen."""

import dataclasses
import inspect
import math

import pytest
import torch
from conftest import make_rollout

from potstill.config import WEIGHTINGS, Objective, RecipeError, make_recipe
from potstill.kl import plan
from potstill.kl.definition import token_divergence
from potstill.kl.terms import LossTerms, TokenStats
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.objectives.tokens import Tokens
from potstill.objectives.weightings import TOGETHER, WEIGHTING_FUNCTIONS
from potstill.rollouts.batching import make_batches
from potstill.types import Credit

# The teacher's entropies lie on both sides, in nats.
ABOVE = 2.0


def credit(score: float, group_score: float) -> Credit:
    return Credit(score=score, group_score=group_score, group_deviation=0.5, advantage=0.0)


# Of several lengths, with tokens that are not trained on, with ties of repeated text, and by both
# writers.
HANDOFF = make_rollout([1, 5], [6, 7, 8, 9, 4, 2])
ROLLOUTS = [
    dataclasses.replace(
        rollout,
        credit=credit(score, mean),
        # An older student's, on both sides of what the models here find.
        engine_log_probs=tuple(-2.0 - (i % 3) for i in rollout.completion_ids),
    )
    for rollout, score, mean in [
        (make_rollout([1, 5, 6], [9, 5, 2]), 1.0, 0.75),
        (make_rollout([1, 7], [4, 4, 8, 9, 6, 2], trained=[True, False, *[True] * 4]), 0.5, 0.25),
        (make_rollout([1, 5, 6, 8], [3] * 11, stop="length"), 0.0, 0.25),
        (make_rollout([1], [2]), 0.25, 1.0),
        (dataclasses.replace(HANDOFF, writers=("teacher",) * 2 + ("student",) * 4), 1.0, 0.0),
    ]
]


@dataclasses.dataclass
class Seen:
    """One rollout's loss tokens on whole logits [T, V], and what is known of each. `p` and `q` are
    probabilities without a gradient, `py` and `qy` those of the written tokens."""

    student: torch.Tensor
    teacher: torch.Tensor
    labels: torch.Tensor
    positions: list[int]
    writers: list[str]
    drawn: list[float]
    score: float
    group_score: float

    def __post_init__(self):
        self.p, self.q = self.teacher.softmax(-1), self.student.detach().softmax(-1)
        rows = range(len(self.labels))
        self.py, self.qy = self.p[rows, self.labels], self.q[rows, self.labels]


def seen(student, teacher, rollout) -> Seen:
    ids = rollout.prompt.token_ids + rollout.completion_ids
    places = [i for i, is_trained in enumerate(rollout.trained) if is_trained]
    rows = [len(rollout.prompt.token_ids) - 1 + i for i in places]
    given = {"input_ids": torch.tensor([ids])}
    return Seen(
        student=student.model(**given).logits[0, rows],
        teacher=teacher.model(**given).logits[0, rows].detach(),
        labels=torch.tensor(ids[-len(rollout.completion_ids) :])[places],
        positions=places,
        writers=[rollout.writers[i] for i in places],
        drawn=[rollout.engine_log_probs[i] for i in places],
        score=rollout.credit.score,
        group_score=rollout.credit.group_score,
    )


# The weights of a token by their definitions: of the forward KL, of the reverse KL, and the reward.
def entropy_aware(x: Seen, above):
    entropy = -(x.p * x.p.log()).sum(-1)
    forward = 0.3 * (entropy > above).double()
    return forward, 1 - forward, 0


def todi(x: Seen):
    return x.py / (x.py + x.qy), x.qy / (x.py + x.qy), 0


def akl(x: Seen, mass):
    on_head = []
    for p, q in zip(x.p.tolist(), x.q.tolist(), strict=True):
        gaps, held, of_head = [abs(a - b) for a, b in zip(p, q, strict=True)], 0.0, 0.0
        for i in sorted(range(len(p)), key=lambda i: -p[i]):
            if held < mass:
                of_head += gaps[i]
            held += p[i]
        on_head.append(of_head / sum(gaps))
    share = torch.tensor(on_head, dtype=torch.float64)
    return share, 1 - share, 0


def by_writer(x: Seen):
    is_teacher = torch.tensor([float(who == "teacher") for who in x.writers])
    return is_teacher, 1 - is_teacher, 0


def mixed(x: Seen, weights):
    """The recipe's mixture, a token times its weight."""
    weights = torch.tensor(weights, dtype=torch.float64)
    return 0.3 * weights, 0.7 * weights, 0


def first_tokens(x: Seen, num):
    return mixed(x, [1.0 if t < num else 0.0 for t in x.positions])


def split(x: Seen, at, before, after):
    return mixed(x, [before if t < at else after for t in x.positions])


def position_decay(x: Seen, half_life):
    return mixed(x, [0.5 ** (t / half_life) for t in x.positions])


def importance(x: Seen, gamma):
    gaps = [abs(math.log(p / q)) for p, q in zip(x.py.tolist(), x.qy.tolist(), strict=True)]
    return mixed(x, [1 + gamma * (1 - sum(gaps[:i]) / sum(gaps)) for i in range(len(gaps))])


def prefix_ratio(x: Seen, cap):
    columns = zip(x.qy.tolist(), x.drawn, x.writers, strict=True)
    ratios = [q / math.exp(told) if who == "student" else 1.0 for q, told, who in columns]
    return mixed(x, [min(math.prod(ratios[:i]), cap) for i in range(len(ratios))])


def least_likely(x: Seen, share, constant):
    order = sorted(range(len(x.qy)), key=lambda i: (x.qy[i].item(), i))
    chosen = order[: round(share * len(order))]
    return 0, 0, torch.tensor([-constant if i in chosen else 0.0 for i in range(len(order))])


def bounded_reward(x: Seen, power):
    return 0, 0, (x.py**power - x.qy**power) / power


def sign_gate(x: Seen, agree, disagree):
    is_right = x.score >= 0.5
    agrees = [p > q if is_right else p <= q for p, q in zip(x.py, x.qy, strict=True)]
    return mixed(x, [agree if each else disagree for each in agrees])


def forward_if_right(x: Seen):
    return (1, 0, 0) if x.score >= 0.5 else (0, 1, 0)


def pass_rate(x: Seen):
    return mixed(x, [x.group_score * (1 - x.group_score)] * len(x.labels))


EXPECTED = {
    "entropy-aware": (entropy_aware, {"above": ABOVE}),
    "todi": (todi, {}),
    "akl": (akl, {"mass": 0.4}),
    "by-writer": (by_writer, {}),
    "first-tokens": (first_tokens, {"num": 3}),
    "split": (split, {"at": 3, "before": 0.5, "after": 2.0}),
    "position-decay": (position_decay, {"half_life": 2.5}),
    "importance": (importance, {"gamma": 0.7}),
    "prefix-ratio": (prefix_ratio, {"cap": 1.3}),
    "least-likely": (least_likely, {"share": 0.4, "constant": 1.5}),
    "bounded-reward": (bounded_reward, {"power": 0.6}),
    "sign-gate": (sign_gate, {"agree": 1.5, "disagree": 0.25}),
    "forward-if-right": (forward_if_right, {}),
    "pass-rate": (pass_rate, {}),
}


def expected(student, teacher, name, rollouts=ROLLOUTS):
    """The loss and its gradients, by autograd of the definitions."""
    function, arguments = EXPECTED[name]
    total = torch.zeros((), dtype=torch.float64)
    for rollout in rollouts:
        x = seen(student, teacher, rollout)
        forward, reverse, reward = function(x, **arguments)
        forward_N, _ = token_divergence(x.student, x.teacher, "forward")
        reverse_N, _ = token_divergence(x.student, x.teacher, "reverse")
        log_q_N = x.student.log_softmax(-1)[range(len(x.labels)), x.labels]
        total = total + (forward * forward_N + reverse * reverse_N - reward * log_q_N).sum()
    total = total / sum(sum(rollout.trained) for rollout in rollouts)
    return [total.detach(), *torch.autograd.grad(total, list(student.parameters()))]


def loss_of(name, arguments=None, **fields) -> Loss:
    objective = Objective(
        prefix="student",
        kl="mixed",
        forward_weight=0.3,
        weights=name,
        weights_arguments=EXPECTED[name][1] if arguments is None else arguments,
    )
    return Loss(objective=objective, normalize="token", vocab_size=23, **fields)


def found(student, teacher, loss, tokens_per_batch=10_000, rollouts=ROLLOUTS):
    """The loss and its gradients as training takes them."""
    student.zero_grad()
    divisor, total = loss.divisor(rollouts), 0.0
    for batch in make_batches(rollouts, tokens_per_batch):
        signal = teacher_signal(teacher, batch, loss)
        loss_sum, _, _ = batch_loss(student, teacher, signal, batch, loss, divisor)
        loss_sum.backward()
        total = total + loss_sum.detach()
    return [total, *(parameter.grad.clone() for parameter in student.parameters())]


def assert_same(a, b, tolerance=1e-9):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.fixture
def pair(student, teacher):
    """Both models in float64, in which closed forms are compared."""
    student.model.double()
    teacher.model.double()
    return student, teacher


def test_functions_and_table_agree():
    """The recipe checks names and arguments by the table alone, and every one is tested here."""
    assert list(WEIGHTINGS) == list(WEIGHTING_FUNCTIONS) == list(EXPECTED)
    assert set(TOGETHER) < set(WEIGHTINGS)
    for name, function in WEIGHTING_FUNCTIONS.items():
        tokens, *arguments = inspect.signature(function).parameters
        assert (tokens, arguments) == ("tokens", list(WEIGHTINGS[name].arguments))
        assert all(
            low <= default <= high for default, low, high in WEIGHTINGS[name].arguments.values()
        )


@pytest.mark.parametrize("tokens_per_batch", [10_000, 1], ids=["one batch", "each rollout"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_value_and_gradient_are_those_of_the_closed_form(pair, name, tokens_per_batch):
    assert_same(found(*pair, loss_of(name), tokens_per_batch), expected(*pair, name))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_closed_forms_tell_apart(pair, name):
    """Weights differ among these tokens, so that the test above can fail: without them the gradient
    is another."""
    plain = loss_of(name, {})
    plain = dataclasses.replace(
        plain, objective=plain.objective.model_copy(update={"weights": None})
    )
    differences = [
        (a - b).abs().max().item()
        for a, b in zip(found(*pair, plain), expected(*pair, name), strict=True)
    ]
    assert max(differences) > 1e-3


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_memory_changes_nothing(pair, name, monkeypatch):
    """Each token's terms are the same in groups of four tokens, all at once, and from whole
    logits."""
    monkeypatch.setattr(plan, "CPU_TILE", (4, 8))
    sizes, results = [], []
    for fields in ({"budget": 0}, {"budget": 1500}, {"budget": 2**24}, {"backend": "plain"}):
        loss, num_tokens = loss_of(name, **fields), []
        weighting = loss.weighting

        def counted(tokens, weighting=weighting, num_tokens=num_tokens):
            num_tokens.append(len(tokens.position_N))
            return weighting(tokens)

        vars(loss)["weighting"] = counted
        results.append(found(*pair, loss))
        sizes.append(num_tokens)
    for each in results[1:]:
        assert_same(results[0], each)
    num = sum(sum(rollout.trained) for rollout in ROLLOUTS)
    assert [sum(each) for each in sizes] == [num] * 4
    assert sizes[1] == ([num] if name in TOGETHER else [4] * 6 + [num - 24])


def test_float32_weights_are_those_of_float64(student, teacher):
    for name in WEIGHTINGS:
        single = found(student, teacher, loss_of(name))
        assert {each.dtype for each in single} == {torch.float32}
        student.model.double()
        teacher.model.double()
        exact = [each.float() for each in expected(student, teacher, name)]
        assert_same(single, exact, tolerance=1e-4)
        student.model.float()
        teacher.model.float()


def test_the_first_tokens_are_a_shorter_window(pair):
    """The same loss as that of rollouts which the window cut, up to the divisor."""
    loss = loss_of("first-tokens", {"num": 3})
    objective = Objective(prefix="student", kl="mixed", forward_weight=0.3)
    plain = Loss(objective=objective, normalize="token", vocab_size=23)
    cut = [
        dataclasses.replace(
            rollout,
            completion_ids=rollout.completion_ids[:3],
            trained=rollout.trained[:3],
            writers=rollout.writers[:3],
        )
        for rollout in ROLLOUTS
    ]
    scale = plain.divisor(cut) / loss.divisor(ROLLOUTS)
    shorter = [each * scale for each in found(*pair, plain, rollouts=cut)]
    # The models' norms are in float32 whatever their weights are.
    assert_same(found(*pair, loss), shorter, tolerance=1e-5)


def of_trl(student, teacher, rollouts, gamma, epsilon=1e-8):
    """The loss of TRL 1.16's IWOPDTrainer, as its lines have it."""
    total = torch.zeros((), dtype=torch.float64)
    for rollout in rollouts:
        x = seen(student, teacher, rollout)
        log_q = x.student.log_softmax(-1).gather(-1, x.labels[:, None]).squeeze(-1)[None]
        log_p = x.teacher.log_softmax(-1).gather(-1, x.labels[:, None]).squeeze(-1)[None]
        a_opd = (log_p - log_q).detach()
        abs_advantages = a_opd.abs()
        prefix_abs_advantages = abs_advantages.cumsum(dim=1) - abs_advantages
        total_abs_advantages = abs_advantages.sum(dim=1, keepdim=True).clamp_min(epsilon)
        weights = 1.0 + gamma * (1.0 - prefix_abs_advantages / total_abs_advantages)
        total = total + (-log_q * (weights * a_opd)).sum()
    return torch.autograd.grad(
        total / sum(sum(rollout.trained) for rollout in rollouts), list(student.parameters())
    )


def test_importance_with_a_sampled_signal_is_that_of_trl(pair):
    loss = loss_of("importance", {"gamma": 0.5})
    objective = Objective(
        prefix="student",
        kl="reverse",
        signal="sampled",
        estimator="k1",
        weights="importance",
        weights_arguments={"gamma": 0.5},
    )
    loss = dataclasses.replace(loss, objective=objective)
    student, teacher = pair
    gradients = found(student, teacher, loss)[1:]
    assert_same(gradients, of_trl(student, teacher, ROLLOUTS, gamma=0.5))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_student_that_is_its_teacher_stays(student, name):
    """Whatever the weights are, but for the one that knows nothing of the teacher."""
    student.model.double()
    largest = max(each.abs().max().item() for each in found(student, student, loss_of(name))[1:])
    assert largest > 1e-2 if name == "least-likely" else largest < 1e-12


def test_the_share_is_rounded_and_of_equals_the_first_are_taken():
    """Halves go to the even number, as `round` takes them."""
    log_probs = torch.tensor([-1.0, -3.0, -3.0, -2.0, -3.0, -1.0, -1.0, -1.0, -2.0, -0.5])
    order = [1, 2, 4, 3, 8, 0, 5, 6, 7, 9]
    for share, num in {0: 0, 0.04: 0, 0.05: 0, 0.06: 1, 0.15: 2, 0.25: 2, 0.26: 3, 1: 10}.items():
        terms = least_likely_of(log_probs, [10], share)
        assert terms.nonzero().flatten().tolist() == sorted(order[:num])
        assert set(terms.tolist()) <= {0.0, -2.0}
    # By rollout: each gives its share, those that are too short none.
    apart = least_likely_of(log_probs, [5, 1, 4], 0.4)
    assert apart.nonzero().flatten().tolist() == [1, 2, 6, 8]
    assert least_likely_of(torch.zeros(0), [0], 0.4).shape == (0,)


def least_likely_of(log_prob_N, lengths, share):
    """The weights that "least-likely" gives to the log-probability of tokens of rollouts so
    long."""
    rollout_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    flags_N, stats = (
        torch.zeros(len(log_prob_N)),
        TokenStats(student_entropy_N=-log_prob_N, student_log_sum_exp_N=log_prob_N),
    )
    tokens = Tokens(
        position_N=rollout_N,
        rollout_N=rollout_N,
        is_student_N=flags_N == 0,
        is_last_N=flags_N == 1,
        sampling_log_prob_N=log_prob_N,
        score_N=None,
        group_score_N=None,
        advantage_N=None,
        terms=LossTerms(reverse=1.0),
        stats=stats,
    )
    return WEIGHTING_FUNCTIONS["least-likely"](tokens, share=share, constant=2.0).cross_entropy


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_likeliest_tokens_alone_are_weighed_too(pair, name):
    """With every token kept it is the whole loss; a recipe refuses what reads more than that."""
    refusals = {
        "it reads how likely the written token is": WEIGHTINGS[name].needs_log_probs,
        "it compares whole distributions": WEIGHTINGS[name].needs_head_share,
    }
    for says in (says for says, is_needed in refusals.items() if is_needed):
        with pytest.raises(RecipeError, match=says):
            recipe_of(name, signal="topk")
        return
    loss = loss_of(name)
    kept = loss.objective.model_copy(update={"signal": "topk", "top_k": 23})
    loss = dataclasses.replace(loss, objective=kept)
    assert_same(found(*pair, loss), expected(*pair, name))


def test_a_mixture_of_the_likeliest_tokens_is_weighed_too(pair):
    """Every token kept, and only the first ones counted: the JSD of the whole distributions."""
    arguments = {"weights": "first-tokens", "weights_arguments": {"num": 2}}
    gradients = []
    for signal in ("full", "topk"):
        objective = Objective(kl="jsd", signal=signal, top_k=23, **arguments)
        gradients.append(found(*pair, Loss(objective=objective, normalize="token", vocab_size=23)))
    assert_same(*gradients)


def recipe_of(name, **objective):
    """A recipe that the weighting fits."""
    known = WEIGHTINGS[name]
    fitting = {
        "prefix": "mixed" if name == "by-writer" else "student",
        "kl": "reverse" if known.is_reward else "mixed",
        "weights": name,
        "weights_arguments": {"at": 3} if name == "split" else {},
    }
    reward = {"group_size": 2} if known.needs_scores else {}
    teacher = {"cache": "somewhere"} if known.needs_older else {}
    return make_recipe({"objective": fitting | objective, "reward": reward, "teacher": teacher})


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_each_has_a_recipe(name):
    """By its defaults it is accepted, and its arguments are in the method's name."""
    recipe = recipe_of(name)
    assert recipe.is_scored == WEIGHTINGS[name].needs_scores
    for argument, value in recipe.objective.weighting_arguments.items():
        assert f"{argument} {value}" in recipe.method
