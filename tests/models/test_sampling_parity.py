"""The sampler against `transformers.generate`, against exact float64 distributions, and against
itself."""

import copy
import random
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from potstill.config import Sampling
from potstill.models.drawing import draw, truncate
from potstill.models.language_model import load_model
from potstill.models.sampling import sample
from potstill.tasks.multiplication import TRACE_AUTHORS, Multiplication, write_trace

SHIPPED = ("potstill:base", "potstill:teacher")
GREEDY = Sampling(temperature=0)
EOS = 2
# `|` and `~` besides the end token: rows stop early and at different places.
MANY_ENDS = (EOS, 17, 19)


@cache
def shipped(name: str):
    return load_model(name)


def equal_prompts(num_prompts: int = 12) -> list[tuple[int, ...]]:
    encode = shipped(SHIPPED[0]).tokenizer.encode
    return [
        tuple(encode(example.prompt))
        for example in Multiplication().examples("train", num_prompts, seed=0)
    ]


def mixed_prompts(num_prompts: int = 12) -> list[tuple[int, ...]]:
    """Prompts that go on with the first 0 to 11 characters of a trace, in no order."""
    encode = shipped(SHIPPED[0]).tokenizer.encode
    rng = random.Random(0)
    prompts = []
    for example in Multiplication().examples("train", num_prompts, seed=0):
        assert isinstance(example.prompt, str)
        trace = "".join(text for text, _ in write_trace(rng, TRACE_AUTHORS["persona"][1], 347, 6))
        prompts.append(tuple(encode(example.prompt + trace[: rng.randrange(12)])))
    assert len({len(prompt) for prompt in prompts}) > 3
    return prompts


def seeds_for(prompts) -> list[tuple[int, ...]]:
    return [(7, i) for i in range(len(prompts))]


def generate_greedily(model, prompts, max_tokens: int, end_ids) -> list[tuple[int, ...]]:
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BT = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    )
    # An end id outside the vocabulary, as generate would take the model's own one where there is
    # none.
    settings = {"eos_token_id": list(end_ids) or [10**6], "pad_token_id": 0, "do_sample": False}
    output = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=max_tokens, **settings)
    return [up_to_end(ids, end_ids) for ids in output[:, longest:].tolist()]


def up_to_end(ids, end_ids) -> tuple[int, ...]:
    length = next((i + 1 for i, token_id in enumerate(ids) if token_id in end_ids), len(ids))
    return tuple(ids[:length])


def exact_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Softmax with temperature, top-k and top-p of one row in float64, written without regard to
    the sampler's own."""
    logits = logits.astype(np.float64) / sampling.temperature
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
        probs /= probs.sum()
    mass = 0.0
    for token_id in order:
        if mass >= sampling.top_p:
            probs[token_id] = 0
        mass += probs[token_id]
    return probs / probs.sum()


def chi_square_p(counts: np.ndarray, probs: np.ndarray) -> float:
    """p-value of counts under probs; cells that expect fewer than 5 are put together."""
    expected = probs * counts.sum()
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    filled = expected > 0
    assert observed[~filled].sum() == 0
    return chisquare(observed[filled], expected[filled]).pvalue


@pytest.mark.parametrize("end_ids", [(EOS,), MANY_ENDS, ()], ids=["one end", "many ends", "no end"])
@pytest.mark.parametrize("prompts_of", [equal_prompts, mixed_prompts])
@pytest.mark.parametrize("name", SHIPPED)
def test_greedy_is_identical_to_generate(name, prompts_of, end_ids):
    model, prompts = shipped(name).model, prompts_of()
    completions = sample(
        model, prompts, seeds_for(prompts), max_tokens=80, end_ids=end_ids, sampling=GREEDY
    )
    assert [completion.token_ids for completion in completions] == generate_greedily(
        model, prompts, 80, end_ids
    )


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
# Learned positions, no positions, sliding-window caches, recurrent states.
ARCHITECTURES = {
    "gpt2": {**TINY, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {**TINY, "n_layer": 2, "n_head": 4},
    "gemma3_text": {**TINY, "head_dim": 8, "sliding_window": 8},
    "lfm2": {**TINY, "block_ff_dim": 64, "layer_types": ["conv", "full_attention"] * 2},
}


@pytest.mark.parametrize("prompts_of", [equal_prompts, mixed_prompts])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures_are_identical_to_generate(architecture, prompts_of):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # Large, so that no two tokens are equally likely but for rounding.
            torch.nn.init.normal_(parameter, std=0.3)
    prompts = prompts_of()
    # Ends that some rows come to early, as random weights may never write one that is fixed
    # beforehand.
    endless = generate_greedily(model, prompts, 50, ())
    end_ids = {ids[5 + 10 * i] for i, ids in enumerate(endless[:3])}
    completions = sample(
        model, prompts, seeds_for(prompts), max_tokens=50, end_ids=tuple(end_ids), sampling=GREEDY
    )
    assert [completion.token_ids for completion in completions] == generate_greedily(
        model, prompts, 50, end_ids
    )
    assert len({len(completion.token_ids) for completion in completions}) > 1, (
        "no row left the batch early"
    )


@pytest.mark.parametrize("prompts_of", [equal_prompts, mixed_prompts])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_batch_gives_what_one_by_one_gives(name, prompts_of):
    model, prompts = shipped(name).model, prompts_of()
    settings = {"max_tokens": 80, "end_ids": (EOS,), "sampling": Sampling()}
    together = sample(model, prompts, seeds_for(prompts), **settings)
    alone = [
        sample(model, [prompts[i]], [seed], **settings)[0]
        for i, seed in enumerate(seeds_for(prompts))
    ]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.stop for c in together] == [c.stop for c in alone]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
        np.testing.assert_allclose(one.entropies, other.entropies, atol=1e-4)


@pytest.mark.parametrize("prompts_of", [equal_prompts, mixed_prompts])
def test_results_do_not_depend_on_batch_size_or_order(prompts_of):
    model, prompts = shipped(SHIPPED[0]).model, prompts_of()
    seeds = seeds_for(prompts)

    def ids(prompts, seeds, batch_size: int):
        settings = {
            "max_tokens": 60,
            "end_ids": (EOS,),
            "sampling": Sampling(batch_size=batch_size),
        }
        return [completion.token_ids for completion in sample(model, prompts, seeds, **settings)]

    expected = ids(prompts, seeds, 64)
    assert expected == ids(prompts, seeds, 64)
    assert expected == ids(prompts, seeds, 5)
    assert expected == ids(prompts, seeds, 1)
    assert expected[::-1] == ids(prompts[::-1], seeds[::-1], 7)
    assert expected != ids(prompts, [(8, i) for i in range(len(prompts))], 64)


@pytest.mark.parametrize("prompts_of", [equal_prompts, mixed_prompts])
def test_stops_are_kept_and_nothing_follows_them(prompts_of):
    model, prompts = shipped(SHIPPED[0]).model, prompts_of(24)
    settings = {"max_tokens": 8, "sampling": Sampling(temperature=1.5)}
    endless = sample(model, prompts, seeds_for(prompts), end_ids=(), **settings)
    assert {(len(completion.token_ids), completion.stop) for completion in endless} == {
        (8, "length")
    }
    completions = sample(model, prompts, seeds_for(prompts), end_ids=MANY_ENDS, **settings)
    for completion, full in zip(completions, endless, strict=True):
        ids = completion.token_ids
        assert ids == up_to_end(full.token_ids, MANY_ENDS)
        assert completion.stop == ("end" if ids[-1] in MANY_ENDS else "length")
        assert len(ids) == len(completion.log_probs) == len(completion.entropies)
    assert {completion.stop for completion in completions} == {"end", "length"}
    assert (
        len({completion.token_ids[-1] for completion in completions if completion.stop == "end"})
        > 1
    )


def test_one_token_at_most():
    model, prompts = shipped(SHIPPED[0]).model, mixed_prompts(24)
    settings = {"max_tokens": 1, "sampling": Sampling(temperature=3)}
    endless = sample(model, prompts, seeds_for(prompts), end_ids=(), **settings)
    assert {(len(completion.token_ids), completion.stop) for completion in endless} == {
        (1, "length")
    }
    end_ids = {completion.token_ids[0] for completion in endless[:3]}
    completions = sample(model, prompts, seeds_for(prompts), end_ids=tuple(end_ids), **settings)
    assert [completion.token_ids for completion in completions] == [
        completion.token_ids for completion in endless
    ]
    stops = ["end" if completion.token_ids[0] in end_ids else "length" for completion in endless]
    assert [completion.stop for completion in completions] == stops
    assert set(stops) == {"end", "length"}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.8),
        Sampling(temperature=1.3, top_k=12, top_p=0.9),
    ],
    ids=lambda sampling: f"T={sampling.temperature},k={sampling.top_k},p={sampling.top_p}",
)
def test_draws_have_the_exact_distribution(sampling):
    num_draws = 200_000
    logits_V = torch.randn(23, generator=torch.Generator().manual_seed(3)) * 1.5
    uniforms_R = torch.from_numpy(np.random.default_rng(1).random(num_draws))
    ids_R, log_probs_R, entropies_R = draw(logits_V.expand(num_draws, -1), uniforms_R, sampling)
    counts = np.bincount(ids_R.numpy(), minlength=23)
    probs = exact_distribution(logits_V.numpy(), sampling)
    assert chi_square_p(counts, probs) > 0.001
    # The same counts tell a temperature that is 3% off, so the test above can fail.
    off = sampling.model_copy(update={"temperature": sampling.temperature * 1.03})
    assert (
        chi_square_p(counts * (probs > 0), exact_distribution(logits_V.numpy(), off) * (probs > 0))
        < 1e-4
    )
    np.testing.assert_allclose(log_probs_R.numpy(), np.log(probs[ids_R.numpy()]), atol=1e-5)
    entropy = -np.sum(probs[probs > 0] * np.log(probs[probs > 0]))
    np.testing.assert_allclose(entropies_R.numpy(), entropy, atol=1e-5)


def test_two_tokens_have_the_exact_joint_distribution():
    model, num_rows = shipped(SHIPPED[0]).model, 8192
    (prompt,) = equal_prompts(1)
    settings = {"max_tokens": 2, "end_ids": (), "sampling": Sampling(batch_size=2048)}
    completions = sample(model, [prompt] * num_rows, [(i,) for i in range(num_rows)], **settings)
    pairs = np.array([completion.token_ids for completion in completions])
    counts = np.bincount(pairs[:, 0] * 23 + pairs[:, 1], minlength=23 * 23)
    with torch.no_grad():
        logits_BTV = model(
            torch.tensor([[*prompt, token_id] for token_id in range(23)])
        ).logits.double()
    first_V, second_VV = logits_BTV[0, -2].softmax(-1), logits_BTV[:, -1].softmax(-1)
    assert chi_square_p(counts, (first_V[:, None] * second_VV).flatten().numpy()) > 0.001


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_k=5)], ids=["exact", "truncated"]
)
@pytest.mark.parametrize("prompts_of", [equal_prompts, mixed_prompts])
@pytest.mark.parametrize("name", SHIPPED)
def test_log_probs_and_entropies_are_those_of_a_full_pass(name, prompts_of, sampling):
    model, prompts = shipped(name).model, prompts_of()
    exact_model = copy.deepcopy(model).double()
    completions = sample(
        model, prompts, seeds_for(prompts), max_tokens=80, end_ids=(EOS,), sampling=sampling
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits_TV = exact_model(
                torch.tensor([prompt + completion.token_ids]), use_cache=False
            ).logits[0]
        rows = logits_TV[len(prompt) - 1 : -1].numpy()
        probs_TV = np.stack([exact_distribution(row, sampling) for row in rows])
        log_probs = np.log(probs_TV[np.arange(len(rows)), completion.token_ids])
        entropies = -np.sum(probs_TV * np.log(np.where(probs_TV > 0, probs_TV, 1)), axis=1)
        np.testing.assert_allclose(completion.log_probs, log_probs, atol=1e-4)
        np.testing.assert_allclose(completion.entropies, entropies, atol=1e-4)


@given(
    st.integers(0, 10_000),
    st.integers(1, 3000),
    st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    st.sampled_from([None, 0, 1]),
    st.one_of(st.just(0), st.integers(1, 3000)),
    st.one_of(st.just(1.0), st.floats(0.01, 0.9999)),
)
@settings(max_examples=150, deadline=None)
def test_truncation_keeps_what_a_stable_sort_of_all_keeps(
    seed, vocab_size, spread, decimals, top_k, top_p
):
    """Rounded logits are equal by the hundred: of those at the border the smallest ids are kept."""
    logits = np.random.default_rng(seed).normal(size=(3, vocab_size)) * spread
    logits = (logits if decimals is None else logits.round(decimals)).astype(np.float32)
    sampling = Sampling(top_k=top_k, top_p=top_p)
    found = truncate(torch.from_numpy(logits), top_k, top_p).numpy()
    for row, kept in zip(logits, found, strict=True):
        assert (
            np.isfinite(kept) == (exact_distribution(row, sampling) > 0)
        ).all() or is_near_border(row, sampling)
        assert (kept[np.isfinite(kept)] == row[np.isfinite(kept)]).all()


def is_near_border(row: np.ndarray, sampling: Sampling) -> bool:
    """Whether rounding decides which tokens are in a nucleus: none but this may be another."""
    probs = np.sort(np.exp(row.astype(np.float64) - row.max()))[::-1][: sampling.top_k or None]
    return bool((np.abs(probs.cumsum() / probs.sum() - sampling.top_p) < 1e-6).any())


def test_a_large_vocabulary_never_gives_a_token_of_probability_zero():
    vocab_size, num_draws = 150_000, 32
    rng = np.random.default_rng(0)
    # Likely tokens among impossible ones, the first and the last 1000 of which are impossible.
    possible = np.sort(rng.choice(np.arange(1000, vocab_size - 1000), 500, replace=False))
    logits_RV = torch.full((num_draws, vocab_size), -torch.inf)
    logits_RV[:, possible] = torch.from_numpy(rng.normal(size=(num_draws, 500)) * 4).float()
    uniforms = rng.random(num_draws)
    uniforms[:4] = (0.0, 1 - 2**-53, 2**-53, 0.5)
    for sampling in (Sampling(), Sampling(temperature=0.3), Sampling(top_p=0.9), Sampling(top_k=3)):
        ids_R, log_probs_R, entropies_R = draw(logits_RV, torch.from_numpy(uniforms), sampling)
        assert set(ids_R.tolist()) <= set(possible.tolist())
        assert torch.isfinite(log_probs_R).all() and torch.isfinite(entropies_R).all()
    assert ids_R[0] in logits_RV[0].topk(3).indices and ids_R[1] in logits_RV[1].topk(3).indices


def test_a_large_vocabulary_loses_no_small_probabilities():
    vocab_size, num_draws = 150_000, 64
    # One likely token, then a thousandth shared by the rest: single ones are lost between the
    # float32 numbers near 1.
    logits_V = torch.zeros(vocab_size)
    logits_V[0] = np.log(999 * (vocab_size - 1))
    share = 0.001 / (vocab_size - 1)
    uniforms = 0.999 + share * (50_000.5 + np.arange(num_draws))
    ids_R, _, _ = draw(logits_V.expand(num_draws, -1), torch.from_numpy(uniforms), Sampling())
    assert len(ids_R.unique()) >= num_draws - 1


@pytest.mark.parametrize("sampling", [Sampling(), GREEDY, Sampling(top_k=2, top_p=0.5)])
def test_logits_that_are_not_finite_give_ids_that_exist(sampling):
    logits_RV = torch.tensor([[0.0, torch.nan, 1.0], [torch.inf, 0.0, 1.0], [torch.nan] * 3])
    ids_R, _, _ = draw(logits_RV, torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64), sampling)
    assert ((ids_R >= 0) & (ids_R < 3)).all()
