"""The loss of spans: equal to `sampled` where both tokenizers cut alike, and in expectation the
gradient of a divergence between what both models say of spans, by listing every text."""

import dataclasses
import itertools
from collections import defaultdict

import pytest
import torch
from sampled import some
from two_tokenizers import (
    character_tokenizer,
    merging_tokenizer,
    random_model,
    reader,
)

from potstill.config import Objective
from potstill.models.language_model import LanguageModel
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.objectives.span_loss import span_sums
from potstill.rollouts.batching import make_batch
from potstill.rollouts.spans import make_translation, with_readings
from potstill.types import Example, Prompt, Rollout

KL = {"k1": "reverse", "k2": "reverse", "k3": "forward"}


def rollout_of(ids, prompts, end_ids):
    mine, theirs = prompts
    return Rollout(
        prompt=Prompt(example=Example(id="0", prompt=""), token_ids=mine, teacher_ids=theirs),
        completion_ids=tuple(ids),
        trained=(True,) * len(ids),
        writers=("student",) * len(ids),
        stop="end" if ids[-1] in end_ids else "length",
    )


def result(student, teacher, rollouts, loss, **options):
    """Value and gradients of the loss of rollouts in one batch, and what it says of each token."""
    student.zero_grad()
    batch = make_batch(rollouts, **options)
    signal = teacher_signal(teacher, batch, loss)
    value, loss_N, stats = batch_loss(student, teacher, signal, batch, loss)
    value.backward()
    gradients = [weight.grad.clone() for weight in student.parameters()]
    return value.detach(), gradients, loss_N, (signal, stats, batch)


def loss_for(student, teacher, estimator, ends=(None, None), **fields):
    """The loss of spans, each model with these ends, by default its own."""
    mine, theirs = (
        reader(model.tokenizer, end_ids)
        for model, end_ids in zip((student, teacher), ends, strict=True)
    )
    return Loss(
        objective=Objective(
            prefix="student", kl=KL[estimator], signal="spans", estimator=estimator
        ),
        vocab_size=mine.vocab_size,
        end_class=mine.class_ids,
        translation=make_translation(mine, theirs),
        **{"normalize": "token", **fields},
    )


def permuted(model):
    """The same model over the same tokens in another order."""
    tokenizer = model.tokenizer
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    characters = [token for token in reversed(tokens) if len(token) == 1]
    other = character_tokenizer(characters)
    order = [
        tokenizer.convert_tokens_to_ids(other.convert_ids_to_tokens(i)) for i in range(len(other))
    ]
    twin = random_model(other, dtype=model.model.dtype)
    state = dict(model.model.state_dict())
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][order]
    twin.model.load_state_dict(state)
    return LanguageModel(twin.model.eval(), other, "permuted"), order


@pytest.mark.parametrize("estimator", KL)
@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("is_permuted", [False, True])
def test_tokenizers_that_cut_alike_give_the_loss_of_sampled(estimator, normalize, is_permuted):
    tokenizer = character_tokenizer("0123456789*=")
    student, teacher = (random_model(tokenizer, seed, spread=8) for seed in (0, 1))
    other, order = permuted(teacher) if is_permuted else (teacher, list(range(len(tokenizer))))
    assert (other.tokenizer.get_vocab() != tokenizer.get_vocab()) == is_permuted
    loss = loss_for(student, other, estimator, normalize=normalize)
    prompts = (0, 5, 7), tuple(order.index(i) for i in (0, 5, 7))
    texts = [(4, 9, 2, 2, 11, 1), (3, 1), (12, 13, 6, 7), (1,), (5, 5, 5, 5, 5, 5, 5, 1)]
    rollouts = with_readings([rollout_of(ids, prompts, (1,)) for ids in texts], loss.translation)
    assert [sum(rollout.trained) for rollout in rollouts] == [6, 2, 3, 1, 8]
    value, gradients, loss_N, told = result(student, other, rollouts, loss)
    sums = span_sums(*told)
    assert sums["num_spans"] == len(loss_N) == 20 and sums["num_left_out"] == 1
    plain = dataclasses.replace(
        loss,
        objective=loss.objective.model_copy(update={"signal": "sampled"}),
        translation=None,
    )
    unread = [
        dataclasses.replace(
            rollout, reading=None, prompt=dataclasses.replace(rollout.prompt, teacher_ids=None)
        )
        for rollout in rollouts
    ]
    expected, slopes, each_N, _ = result(student, teacher, unread, plain)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss_N, each_N, rtol=1e-5, atol=1e-6)
    scale = max(float(slope.abs().max()) for slope in slopes)
    for mine, theirs in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * scale)


def test_batches_add_up_whoever_is_beside_whom():
    student = random_model(character_tokenizer("0123456789*="), 0, spread=8, dtype=torch.float64)
    other = random_model(merging_tokenizer("0123456789*="), 1, spread=8, dtype=torch.float64)
    loss = loss_for(student, other, "k1", normalize="sequence")
    texts = [(4, 9, 2, 2, 11, 1), (0, 1), (3, 1), (12, 13, 6, 7), (5, 5, 5, 5, 5, 5, 5, 1)]
    rollouts = [rollout_of(ids, ((0, 5), (12, 5)), (1,)) for ids in texts]
    rollouts = with_readings(rollouts, loss.translation)
    whole, gradients, _, _ = result(student, other, rollouts, loss)
    parts = [result(student, other, [rollout], loss) for rollout in rollouts]
    assert parts[1][0] == 0 and not any(map(torch.any, parts[1][1]))
    torch.testing.assert_close(whole, torch.stack([part[0] for part in parts]).sum())
    for place, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, torch.stack([p[1][place] for p in parts]).sum(0))


# By listing every text. Tokens of the student: 0 and 1 are special, 2 and 3 the letters.
LETTERS, WINDOW = "ab", 4
END = "end"


def merged(text, pairs):
    """The tokens of a BPE by its definition: of all pairs the first in rank, everywhere."""
    tokens = list(text)
    while found := [p for p in pairs if p in list(itertools.pairwise(tokens))]:
        first, place, joined = found[0], 0, []
        while place < len(tokens):
            if tuple(tokens[place : place + 2]) == first:
                joined.append("".join(first))
                place += 2
            else:
                joined.append(tokens[place])
                place += 1
        tokens = joined
    return tokens


def spans_by_definition(ids, end_ids):
    """Pairs of a text before and a span after it, END for the end, of those in the loss."""
    body = ids[:-1] if ids[-1] in end_ids else ids
    text = "".join(LETTERS[i - 2] for i in itertools.takewhile(lambda i: i > 1, body))
    tokens = merged(text, [(a, b) for a in LETTERS for b in LETTERS])
    cuts = list(itertools.accumulate(map(len, tokens)))
    has_end = ids[-1] in end_ids and len(text) == len(body)
    cuts = cuts if has_end else cuts[:-1]
    found = [(text[:a], text[a:b]) for a, b in itertools.pairwise([0, *cuts])]
    return found + [(text, END)] * has_end


def log_prob(model, prompt, before, span, end_ids):
    """The log-probability of a span after a text, each cut by the model's own tokenizer."""
    encode = model.tokenizer.encode
    start = [*prompt, *encode(before, add_special_tokens=False)]
    ids = [] if span is END else encode(span, add_special_tokens=False)
    logits = model.model(torch.tensor([[*start, *ids]])).logits[0].log_softmax(-1)
    if span is END:
        return logits[-1, list(end_ids)].logsumexp(0)
    return sum(logits[len(start) - 1 + n, i] for n, i in enumerate(ids))


def all_texts(end_ids):
    letters = [i for i in range(4) if i not in end_ids]
    for n in range(WINDOW):
        for body in itertools.product(letters, repeat=n):
            yield from ((*body, i) for i in (*end_ids, *(letters if n == WINDOW - 1 else ())))


@pytest.mark.parametrize(
    ("estimator", "end_ids"),
    some([(k, ends) for ends in ((1,), (1, 0)) for k in KL], every=5),
)
def test_the_expected_gradient_is_that_of_a_divergence_of_spans(estimator, end_ids):
    student = random_model(character_tokenizer(LETTERS), 3, spread=30, dtype=torch.float64)
    teacher = random_model(merging_tokenizer(LETTERS, LETTERS), 4, spread=30, dtype=torch.float64)
    names = ["</s>", "<s>"]
    their_ends = tuple(teacher.tokenizer.convert_tokens_to_ids(names[: len(end_ids)]))
    loss = loss_for(student, teacher, estimator, ends=(end_ids, their_ends))
    prompts = (2, 3), (3, 2)
    weights = list(student.parameters())
    expected = [torch.zeros_like(weight) for weight in weights]
    mean = 0.0
    mass = defaultdict(float)
    num_left_out = 0
    for ids in all_texts(end_ids):
        logits = student.model(torch.tensor([[*prompts[0], *ids]])).logits[0].log_softmax(-1)
        prob = sum(logits[1 + n, i] for n, i in enumerate(ids)).exp().item()
        rollouts = with_readings([rollout_of(ids, prompts, end_ids)], loss.translation)
        value, gradients, _, _ = result(student, teacher, rollouts, loss)
        for total, gradient in zip(expected, gradients, strict=True):
            total += prob * gradient
        mean += prob * value.item()
        for pair in spans_by_definition(ids, end_ids):
            mass[pair] += prob
        num_left_out += ids[-1] in end_ids and not all(rollouts[0].trained)
    assert (num_left_out > 0) == (len(end_ids) == 1)
    student.zero_grad()
    divergence, value = 0.0, 0.0
    for (before, span), its_mass in mass.items():
        log_q = log_prob(student, prompts[0], before, span, end_ids)
        log_p = log_prob(teacher, prompts[1], before, span, their_ends).detach()
        (q, p), weight = (log_q.exp(), log_p.exp()), its_mass / log_q.exp().item()
        a, b, ratio = (q, p, log_q - log_p) if KL[estimator] == "reverse" else (p, q, log_p - log_q)
        divergence = divergence + weight * (a * ratio - a + b)
        k = (log_q - log_p).item()
        value += its_mass * {"k1": k, "k2": k * k / 2}.get(estimator, (p / q).item() - 1 + k)
    divergence.backward()
    assert mean == pytest.approx(value, rel=1e-10)
    scale = max(float(weight.grad.abs().max()) for weight in weights)
    assert scale > 0.05
    for total, weight in zip(expected, weights, strict=True):
        torch.testing.assert_close(total, weight.grad, rtol=1e-8, atol=1e-10 * scale)
