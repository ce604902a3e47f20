"""Two heads of different sizes: which rows the loss is over, what is drawn, and which tokenizers go
together."""

from pathlib import Path

import pytest
import torch
from conftest import make_model, tiny_recipe
from odd_models import make_tiny, make_tokenizer, write_folder
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import potstill
from potstill.config import CacheOptions, Evaluation, Sampling
from potstill.models.language_model import ModelError
from potstill.models.probe import ready
from potstill.models.sampling import sample
from potstill.runs import run_folder
from potstill.teachers.manifest import CacheError
from potstill.teachers.vocabulary import (
    describe_difference,
    num_named_rows,
    shared_vocab_size,
    unshared_tokens,
)
from potstill.types import DataError

NUM_IDS, PADDING = 314, 40


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer()


@pytest.fixture(scope="module")
def pair(tok):
    """A model, and one of the same tokenizer whose head has rows beyond it that it would draw
    nearly always."""
    wide = make_tiny(tok, seed=2, rows=PADDING, tie_word_embeddings=False)
    with torch.no_grad():
        # An end of the first coordinate of each hidden state, so that some padding row is always
        # likely.
        wide.lm_head.weight[NUM_IDS:] *= 40
    return {"plain": make_tiny(tok), "wide": wide}


SOURCES = {
    "student": {"prefix": "student", "kl": "reverse"},
    "teacher": {"prefix": "teacher"},
    "sequence": {"prefix": "mixed"},
    "handoff": {"prefix": "mixed", "prefix_mix": "handoff", "handoff_tokens": (2, 4)},
    "token": {"prefix": "mixed", "prefix_mix": "token"},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("student", ["plain", "wide"])
def test_only_shared_rows_are_drawn(tok, pair, tmp_path, source, student):
    teacher = "wide" if student == "plain" else "plain"
    recipe = tiny_recipe(
        tmp_path / "run",
        objective=SOURCES[source],
        window={"tokens": 8},
        train={"steps": 1, "prompts_per_step": 4, "checkpoint_every": 1},
    )
    objects = {
        name: make_copy(pair[which]) for name, which in (("student", student), ("teacher", teacher))
    }
    potstill.train(
        recipe, **objects, tokenizer=tok, prompts=["The", "loss", "is", "one"], quiet=True
    )
    assert run_folder.read_rows(tmp_path / "run/metrics.jsonl")[0]["num_loss_tokens"] > 4


def make_copy(model):
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_draws_follow_the_distribution_over_the_shared_rows(tok, pair):
    """Log-probabilities are those of a softmax over the cut head."""
    prompt = tuple(tok.encode("The loss is"))
    wide = pair["wide"]
    options = {"end_ids": (2,), "sampling": Sampling(), "max_tokens": 12}
    (free,) = sample(wide, [prompt], [(0,)], **options)
    assert max(free.token_ids) >= NUM_IDS, "else there would be nothing to cut"
    (cut,) = sample(wide, [prompt], [(0,)], vocab_size=NUM_IDS, **options)
    ids = torch.tensor([prompt + cut.token_ids])
    with torch.no_grad():
        log_probs = wide(input_ids=ids).logits[0, :, :NUM_IDS].log_softmax(-1)[len(prompt) - 1 : -1]
    chosen = log_probs.gather(1, torch.tensor(cut.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(cut.log_probs), chosen, atol=1e-4, rtol=1e-4)


def test_a_cache_holds_only_shared_rows_and_says_of_how_many(tok, pair, tmp_path):
    recipe = tiny_recipe(
        tmp_path / "run", window={"tokens": 8}, train={"steps": 1, "prompts_per_step": 4}
    )
    given = {"tokenizer": tok, "prompts": ["The", "loss", "is", "one"], "quiet": True}
    objects = {"student": make_copy(pair["plain"]), "teacher": make_copy(pair["wide"])}
    manifest = potstill.build_cache(recipe, tmp_path / "cache", CacheOptions(), **objects, **given)
    assert manifest.settings.vocab_size == NUM_IDS
    cached = recipe.model_copy(
        update={"teacher": recipe.teacher.model_copy(update={"cache": str(tmp_path / "cache")})}
    )
    potstill.train(cached, **objects, **given)
    both_wide = {"student": make_copy(pair["wide"]), "teacher": make_copy(pair["wide"])}
    potstill.build_cache(recipe, tmp_path / "all rows", CacheOptions(), **both_wide, **given)
    teacher = recipe.teacher.model_copy(update={"cache": str(tmp_path / "all rows")})
    other = recipe.model_copy(update={"teacher": teacher, "out": tmp_path / "other"})
    with pytest.raises(
        CacheError, match="drawn from 354 vocabulary rows, and this student shares 314"
    ):
        potstill.train(other, **objects, **given)


def test_an_evaluation_draws_tokens_that_have_a_name(tok, pair, tmp_path):
    settings = Evaluation(
        source="multiplication", num_problems=2, num_responses=4, temperatures=(1.0,), max_tokens=12
    )
    model = ready(make_copy(pair["wide"]), tok)
    assert num_named_rows(model) == NUM_IDS < model.vocab_size
    (row,) = potstill.evaluate(model, settings, responses=tmp_path, quiet=True)
    (file,) = tmp_path.glob("*.jsonl")
    lengths = [(r["length"], len(r["text"])) for r in run_folder.read_rows(file)]
    assert all(num_characters > 0 for _, num_characters in lengths) and row["length"].value > 1


def test_vocabularies_must_agree_on_what_they_share():
    student, teacher = make_model(vocab_size=23), make_model(vocab_size=40)
    assert shared_vocab_size(student, teacher) == shared_vocab_size(teacher, student) == 23
    student.tokenizer.add_tokens(["<mine>"])
    teacher.tokenizer.add_tokens(["<theirs>"])
    with pytest.raises(
        ModelError, match=r"differ at 1 ids \(student / teacher: 23: '<mine>' / '<theirs>'\)"
    ):
        shared_vocab_size(student, teacher)


def pair_merging(*merged: tuple[str, str]):
    """A tokenizer of the letters a to d and the space, which joins these pairs."""
    words = ["<s>", "</s>", "<pad>", *"abcd", "\u0120", *("".join(pair) for pair in merged)]
    tok = Tokenizer(BPE({word: i for i, word in enumerate(words)}, list(merged)))
    tok.pre_tokenizer = ByteLevel(add_prefix_space=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tok, **names)


def test_the_refusal_says_how_far_two_tokenizers_are_apart():
    """Counted by hand: of 9 and 9 tokens 8 are common, and `abc d` is cut alike in its last two
    characters of five."""
    mine, theirs = pair_merging(("a", "b")), pair_merging(("b", "c"))
    assert describe_difference(mine, theirs, ["abc d"]) == (
        "8 of the student's 9 tokens (89%) are among the teacher's 9, 40% of this run's texts are "
        "cut alike ('ab|c' to the student is 'a|bc' to the teacher)"
    )
    assert describe_difference(mine, theirs, []).endswith("among the teacher's 9")
    student, teacher = make_model(seed=0), make_model(seed=1)
    student.tokenizer, teacher.tokenizer = mine, theirs
    given = {"student": student, "teacher": teacher, "quiet": True}
    message = r"differ at 1 ids .*, 70% of this run's texts .* signal = \"labels\"$"
    with pytest.raises(ModelError, match=message):
        potstill.train(tiny_recipe("unused"), prompts=["abc d", "cd da"], **given)


def test_tokens_that_one_tokenizer_alone_has_are_cut_off(tok, tmp_path, capsys):
    """They are rows of padding on the other side; both heads have more rows than that."""
    more = make_tokenizer()
    more.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=True)
    student = write_folder(tmp_path / "student", tok, make_tiny(tok, rows=20))
    teacher = write_folder(tmp_path / "teacher", more, make_tiny(more, seed=1, rows=40))
    loaded = ready(student), ready(teacher)
    for first, second in (loaded, loaded[::-1]):
        assert shared_vocab_size(first, second) == NUM_IDS
        assert unshared_tokens(first, second) == {
            NUM_IDS: "<tool_call>",
            NUM_IDS + 1: "</tool_call>",
        }

    def run(student: Path, teacher: Path, prompt: str):
        recipe = tiny_recipe(
            tmp_path / f"{student.name} of {prompt}",
            student={"model": str(student)},
            teacher={"model": str(teacher)},
            train={"steps": 1, "prompts_per_step": 1},
        )
        return potstill.train(recipe, prompts=[prompt])

    run(student, teacher, "The <tool_call>")
    said = " ".join(capsys.readouterr().err.split())
    assert "heads of 334 (student) and 356 (teacher) rows are cut to the 314 they share" in said
    assert (
        "2 tokens that one tokenizer alone has ('<tool_call>', '</tool_call>') are left out" in said
    )
    with pytest.raises(
        DataError, match=r"prompt '0' has the token '<tool_call>' \(314\), which is not among"
    ):
        run(teacher, student, "The <tool_call>")
    loaded[1].end_ids = (2, NUM_IDS)
    assert shared_vocab_size(*loaded) == NUM_IDS
    loaded[1].end_ids = (NUM_IDS,)
    with pytest.raises(
        ModelError, match=r"ends with '<tool_call>' \(314\), which is not among the 314"
    ):
        shared_vocab_size(*loaded)
