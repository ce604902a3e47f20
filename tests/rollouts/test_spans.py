"""Spans against their definition: cuts by decoding every beginning of a text, and their
intersection."""

import dataclasses
import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_tokenizers import FAMILIES, family_tokenizer, metaspace_tokenizer
from two_tokenizers import (
    byte_tokenizer,
    character_tokenizer,
    merging_tokenizer,
    reader,
    space_tokenizer,
)

from potstill.prompts.encoding import Encoding
from potstill.rollouts.spans import cut, make_translation
from potstill.types import Example, ModelError, Prompt, Rollout

TEXTS = [
    "the cat, the naïve cat, and 12345 日本語の猫 🙂🙃 über\n",
    "= 12 * 345 = 67\n\n  là-bas  ",
]
LETTERS = "".join(dict.fromkeys("".join(TEXTS) + "éßж中\u0301\u200d👩"))
TOKENIZERS = {
    "few bytes": lambda: byte_tokenizer(TEXTS, 270),
    "many bytes": lambda: byte_tokenizer(TEXTS * 3, 330),
    "characters": lambda: character_tokenizer(LETTERS),
    "spaces": lambda: space_tokenizer(TEXTS, 330),
}
some_text = st.lists(st.sampled_from([*LETTERS, *TEXTS[0].split(), " "]), max_size=14).map("".join)


@functools.cache
def made(name):
    return TOKENIZERS[name]()


def cuts_of(tokenizer, before, ids):
    """The places where a token ends a text that is whole, by decoding every beginning."""

    def text_of(tokens):
        return tokenizer.decode([*before, *tokens], clean_up_tokenization_spaces=False)

    start = len(text_of([]))
    texts = [text_of(ids[: i + 1])[start:] for i in range(len(ids))]
    return [None if "\ufffd" in text else len(text) for text in texts], texts[-1] if texts else ""


def encoding(tokenizer):
    """As a text that follows another."""
    return Encoding(tokenizer).continuation


def rollout_of(ids, stop="end", before=(0,), theirs=(0,)):
    example = Example(id="0", prompt="")
    return Rollout(
        prompt=Prompt(example=example, token_ids=tuple(before), teacher_ids=tuple(theirs)),
        completion_ids=tuple(ids),
        trained=(True,) * len(ids),
        writers=("student",) * len(ids),
        stop=stop,
    )


def span_texts(tokenizer, before, ids, spans):
    """The text of each span by its tokens."""
    found, so_far = [], list(before)
    for number in range(max(spans, default=-1) + 1):
        its = [i for i, span in zip(ids, spans, strict=True) if span == number]
        start = len(tokenizer.decode(so_far))
        so_far += its
        found.append(tokenizer.decode(so_far)[start:])
    return found


@pytest.mark.parametrize("mine", TOKENIZERS)
@pytest.mark.parametrize("theirs", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(text=some_text, chance=st.integers(0, 2**20), ends=st.booleans())
def test_spans_are_cut_where_both_tokenizers_cut_and_nowhere_else(mine, theirs, text, chance, ends):
    one, other = made(mine), made(theirs)
    translation = make_translation(reader(one), reader(other))
    before = [one.bos_token_id, *one.encode("the", add_special_tokens=False)]
    ahead = [other.bos_token_id, *other.encode("the", add_special_tokens=False)]
    # Cut anywhere, so that the tokens are not those that the tokenizer would write.
    place = chance % (len(text) + 1)
    ids = [i for part in (text[:place], text[place:]) for i in encoding(one)(part)]
    ids = [*ids, one.eos_token_id] if ends else ids
    if not ids:
        return
    read = translation.reading(rollout_of(ids, "end" if ends else "length", before, ahead))
    reading = read.reading
    assert reading is not None
    body = ids[:-1] if ends else ids
    cuts, whole = cuts_of(one, before, body)
    written = encoding(other)(whole) if whole else ()
    others, again = cuts_of(other, ahead, list(written))
    assert whole == text and again == text
    shared = sorted({c for c in cuts if c} & {c for c in others if c})
    shared = shared if ends else shared[:-1]
    assert reading.num_spans == len(shared) + ends
    mine_in, theirs_in = (
        [n for n, yes in enumerate(flags) if yes] for flags in (read.trained, reading.trained)
    )
    parts = [text[a:b] for a, b in zip([0, *shared], shared, strict=False)]
    num = len(mine_in) - ends
    assert span_texts(one, before, ids[:num], reading.student_spans[:num]) == parts
    num = len(theirs_in) - ends
    told = reading.token_ids[:num]
    assert span_texts(other, ahead, told, reading.teacher_spans[:num]) == parts
    if ends:
        assert read.trained[-1] and reading.token_ids[-1] == other.eos_token_id
        assert "".join(parts) == text and all(read.trained) and all(reading.trained)
    if mine == theirs and ends and ids == [*encoding(one)(text), one.eos_token_id]:
        assert reading.token_ids == tuple(ids)


def test_digits_that_one_tokenizer_merges():
    translation = make_translation(
        reader(character_tokenizer("0123456789*=")), reader(merging_tokenizer("0123456789*="))
    )
    tokenizer, other = translation.student.tokenizer, translation.teacher.tokenizer
    ids = tokenizer.encode("123*4=12</s>", add_special_tokens=False)
    reading = translation.reading(rollout_of(ids)).reading
    assert [other.decode([i]) for i in reading.token_ids] == [
        *("12", "3", "*", "4", "=", "12", "</s>")
    ]
    assert reading.student_spans == (0, 0, 1, 2, 3, 4, 5, 5, 6)
    assert reading.teacher_spans == (0, 1, 2, 3, 4, 5, 6)


def test_what_is_no_text_is_left_out_with_all_after_it_and_the_span_before():
    one, other = made("few bytes"), character_tokenizer("the ca🙂")
    translation = make_translation(reader(one), reader(other))
    encode = functools.partial(one.encode, add_special_tokens=False)
    half = encode("é")[:1]
    end = one.eos_token_id
    for ids, num in (
        ([*encode("the cat"), one.bos_token_id, *encode("the"), end], "the"),
        ([*encode("the cat"), *half, *encode("the"), end], "the"),
        # The teacher has no "!", and its tokens of what comes before may be others without it.
        ([*encode("the cat"), *encode("!the"), end], "the"),
        ([*encode("the cat"), *half], "the"),
        ([*encode("the cat"), *half, end], "the"),
        ([one.bos_token_id, end], ""),
        ([end], None),
    ):
        read = translation.reading(rollout_of(ids))
        kept = [i for i, yes in zip(ids, read.trained, strict=True) if yes]
        if num is None:
            assert kept == [end] and read.reading.num_spans == 1
            continue
        assert one.decode(kept) == num
        assert len(read.reading.student_spans) == len(kept)
        assert sum(read.reading.trained) == len(read.reading.teacher_spans)
        assert read.trained == tuple(sorted(read.trained, reverse=True))
    # A second end of the student's that is no end of an answer.
    translation = make_translation(reader(one, end_ids=(7,)), reader(other))
    read = translation.reading(rollout_of([*encode("the cat"), end]))
    assert not read.trained[-1]


def test_a_teacher_reads_no_more_than_its_context():
    one, other = character_tokenizer("abc"), merging_tokenizer("abc", "")
    ids = one.encode("abcabcabc</s>", add_special_tokens=False)
    for room, num in ((10, 10), (9, 7), (3, 1), (2, 0), (1, 0)):
        translation = make_translation(reader(one), reader(other, context_length=room))
        read = translation.reading(rollout_of(ids))
        assert sum(read.trained) == num, room
        assert len(read.prompt.ids_of("teacher")) + len(read.reading.token_ids) - 1 <= room


@pytest.mark.parametrize("family", [*FAMILIES, "metaspace"])
def test_texts_of_model_families_are_followed(family):
    one = metaspace_tokenizer() if family == "metaspace" else family_tokenizer(family)
    text = " 12 * 3 = 36?\n"
    ids = encoding(one)(text)
    found = cut(one, one.encode("1"), ids, frozenset())
    assert found.text == text and found.ends == tuple(cuts_of(one, one.encode("1"), list(ids))[0])


def test_tokenizers_that_cannot_be_followed_are_refused():
    class Slow:
        is_fast = False

    one = made("characters")
    slow = dataclasses.replace(reader(one), tokenizer=Slow())
    with pytest.raises(ModelError, match=r"the teacher's tokenizer is a Slow.*tokenizer\.json"):
        make_translation(reader(one), slow)
    with pytest.raises(ModelError, match="the student names no token that ends"):
        make_translation(reader(one, end_ids=()), reader(one))


def test_long_texts_take_time_in_proportion():
    rng = random.Random(0)
    one, other = made("few bytes"), made("many bytes")
    text = "".join(rng.choices(LETTERS, k=20_000))
    ids = [*one.encode(text, add_special_tokens=False), one.eos_token_id]
    read = make_translation(reader(one), reader(other)).reading(rollout_of(ids))
    assert all(read.trained) and read.reading.num_spans > 1000


@pytest.mark.parametrize("mine", TOKENIZERS)
def test_any_tokens_are_in_the_same_spans_for_both_or_in_none(mine):
    rng = random.Random(mine)
    one, end = made(mine), made(mine).eos_token_id
    for theirs in TOKENIZERS:
        translation = make_translation(reader(one), reader(made(theirs)))
        for number in range(60):
            ids = [rng.randrange(len(one)) for _ in range(rng.randrange(1, 20))]
            stop = "end" if number % 2 else "length"
            read = translation.reading(rollout_of([*ids, end] if stop == "end" else ids, stop))
            reading = read.reading
            assert reading is not None
            assert len(reading.student_spans) == sum(read.trained)
            assert len(reading.teacher_spans) == sum(reading.trained)
            for spans in (reading.student_spans, reading.teacher_spans):
                assert list(dict.fromkeys(spans)) == list(range(reading.num_spans))
