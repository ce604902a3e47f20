"""Completions as a teacher with another tokenizer reads them, and the spans that both models'
tokens are in: parts of the text between two places where both tokenizers cut it."""

import bisect
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.prompts.encoding import Encoding
from potstill.types import ModelError, Reading, Rollout

# The character that stands for bytes that are none.
NO_CHARACTER = "\ufffd"
# Tokens before a text after which it is decoded: some tokenizers drop the space of a first word.
NUM_BEFORE = 8


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One model's way from texts to tokens: its tokenizer, and the end tokens that mean the end of
    an answer. `vocab_size` is that of the model's tokens, `context_length` how many it can read,
    None for any number."""

    tokenizer: Any
    end_ids: tuple[int, ...]
    vocab_size: int
    context_length: int | None

    @property
    def class_ids(self) -> tuple[int, ...]:
        """The end ids that are one class; none where there is one alone."""
        return self.end_ids if len(self.end_ids) > 1 else ()


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Both models' ways from texts to tokens, and the ids that stand for no text: special tokens
    and ends."""

    student: Spelling
    teacher: Spelling
    encoding: Encoding
    no_text: tuple[frozenset[int], frozenset[int]]

    def reading(self, rollout: Rollout) -> Rollout:
        """The rollout with the teacher's reading of it. Tokens in no span are no loss tokens.

        The last span is the end: the class of the student's end tokens, and that of the teacher's.
        Without it the text may have been cut within a token of the teacher, and the span before is
        left out. So is all from a token on that is no text, that the teacher's tokenizer does not
        give back, or that its context has no room for.
        """
        ids, before = rollout.completion_ids, rollout.prompt.ids_of("teacher")
        mine = cut(self.student.tokenizer, rollout.prompt.token_ids, ids, self.no_text[0])
        written = self.encoding.continuation(mine.text) if mine.text else ()
        limit = self.teacher.context_length
        room = len(written) if limit is None else max(limit - len(before), 0)
        theirs = cut(self.teacher.tokenizer, before, written[:room], self.no_text[1])
        shared = shared_ends(mine, theirs)
        has_end = (
            rollout.stop == "end"
            and ids[-1] in self.student.end_ids
            and len(mine.ends) == len(ids) - 1
            and (theirs.text, len(theirs.ends)) == (mine.text, len(written))
        )
        shared = shared if has_end else shared[:-1]
        spans = [spans_of(side.ends, shared) for side in (mine, theirs)]
        end = (len(shared),) * has_end
        num_left_out = len(ids) - len(spans[0]) - has_end
        trained = (True,) * len(spans[0]) + (False,) * num_left_out + (True,) * has_end
        # The end is the last token, which nothing is predicted from.
        teacher_ids = (*written[: len(spans[1])], self.teacher.end_ids[0])
        reading = Reading(
            token_ids=teacher_ids,
            trained=(True,) * len(spans[1]) + (has_end,),
            student_spans=(*spans[0], *end),
            teacher_spans=(*spans[1], *end),
            num_spans=len(shared) + has_end,
        )
        return dataclasses.replace(rollout, trained=trained, reading=reading)


def with_readings(rollouts: Sequence[Rollout], translation: Translation | None) -> list[Rollout]:
    """Rollouts as the teacher reads them, where it has a tokenizer of its own."""
    if translation is None:
        return list(rollouts)
    return [translation.reading(rollout) for rollout in rollouts]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The text of some tokens, up to the first that is none, and for each of these tokens the place
    in the text where it ends, or where the first character ends that it has a part of."""

    text: str
    ends: tuple[int, ...]


def cut(tokenizer, before: Sequence[int], ids: Sequence[int], no_text: Collection[int]) -> Cut:
    """The text of `ids` after other tokens, in one pass."""
    before = before[-NUM_BEFORE:]
    found = _pieces(tokenizer, (*before, *ids))
    for _ in itertools.islice(found, len(before)):
        pass
    pieces: list[str] = []
    ends: list[int] = []
    place = num_waiting = 0
    for i, piece in zip(ids, found, strict=False):
        if i in no_text or NO_CHARACTER in (piece or ""):
            break
        num_waiting += 1
        if piece is not None:
            place += len(piece)
            pieces.append(piece)
            ends += [place] * num_waiting
            num_waiting = 0
    return Cut(text="".join(pieces), ends=tuple(ends))


def _pieces(tokenizer, ids: Iterable[int]) -> Iterator[str | None]:
    """The text that each token adds to those before it, None where a character is not whole; up to
    a token that turns what was text into none."""
    from tokenizers.decoders import DecodeStream

    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    for i in ids:
        try:
            piece = stream.step(backend, i)
        except Exception as error:
            # tokenizers has no class of its own for it.
            if not str(error).startswith("Invalid prefix"):
                raise
            return
        yield piece


def shared_ends(mine: Cut, theirs: Cut) -> list[int]:
    """The places where both end a token, up to where their texts differ."""
    pairs = enumerate(zip(mine.text, theirs.text, strict=False))
    shortest = min(len(mine.text), len(theirs.text))
    num_alike = next((place for place, (a, b) in pairs if a != b), shortest)
    return sorted(end for end in {*mine.ends} & {*theirs.ends} if end <= num_alike)


def spans_of(ends: Sequence[int], shared: Sequence[int]) -> tuple[int, ...]:
    """The span of each token, of those up to the last shared end."""
    num = bisect.bisect_right(ends, shared[-1]) if shared else 0
    return tuple(bisect.bisect_left(shared, end) for end in ends[:num])


def make_translation(student: Spelling, teacher: Spelling) -> Translation:
    """The translation between two models. Raises ModelError for a tokenizer that cannot be
    followed, and for a model without an end."""
    for who, spelling in (("student", student), ("teacher", teacher)):
        if not spelling.tokenizer.is_fast:
            raise ModelError(
                f"the {who}'s tokenizer is a {type(spelling.tokenizer).__name__}, which is none of "
                'the library tokenizers, by which objective.signal = "spans" follows texts; '
                "choose a model with a tokenizer.json"
            )
        if not spelling.end_ids:
            raise ModelError(
                f"the {who} names no token that ends an answer, which objective.signal = "
                '"spans" needs; set eos_token_id in its generation_config.json'
            )
    return Translation(
        student=student,
        teacher=teacher,
        encoding=Encoding(teacher.tokenizer),
        no_text=(_no_text(student), _no_text(teacher)),
    )


def _no_text(spelling: Spelling) -> frozenset[int]:
    """The ids that stand for no text: special tokens and end tokens."""
    added = spelling.tokenizer.added_tokens_decoder.items()
    special = [i for i, token in added if token.special]
    return frozenset((*special, *spelling.tokenizer.all_special_ids, *spelling.end_ids))
