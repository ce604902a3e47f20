"""From texts to token ids: prompts with one start, completions with one end, and prompts that are
too long."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from potstill.models.templates import ChatTemplate, text_of
from potstill.prompts.chat import Texts, answers_of, closing_ids
from potstill.types import DataError, Example, Prompt

TooLong = Literal["refuse", "drop", "cut-left"]
# Texts before another one, with the first token of which one of them makes none.
STARTS = ("\n", "a", "1", "?")
MarkedIds = tuple[tuple[int, ...], tuple[bool, ...]]


class Encoding:
    """A tokenizer's way with texts that stand alone, and with texts that go on after others.

    `start_ids` is what it puts before a text. What it puts after one is no part of a prompt:
    nothing follows an end.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        text = next((text for text in "a1" if self.encode(text)), "a")
        alone, whole = self.encode(text), tuple(tokenizer.encode(text))
        starts = [i for i in range(len(whole)) if alone and whole[i : i + len(alone)] == alone]
        self.start_ids = whole[: starts[0]] if starts else ()
        self.adds_space = bool(alone) and tokenizer.convert_ids_to_tokens(alone[0]).startswith("▁")

    def encode(self, text: str) -> tuple[int, ...]:
        """A text with nothing added. Raises DataError for one that is not whole Unicode, as bytes
        of another encoding on the command line are."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"a text of {len(text)} characters has {text[error.start]!r} at character "
                f"{error.start + 1}, which is no character; give UTF-8 text"
            ) from None
        # Whether a prompt is too long is said by `fit_prompts`, which knows the models' context.
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def start_of(self, text: str) -> tuple[int, ...]:
        """A prompt that is taken as it is, with one start."""
        ids = self.encode(text)
        return ids if self.is_started(ids) else self.start_ids + ids

    def is_started(self, ids: Sequence[int]) -> bool:
        return tuple(ids[: len(self.start_ids)]) == self.start_ids

    def continuation(self, text: str) -> tuple[int, ...]:
        """A text that follows another: without the space that some tokenizers put before every
        text."""
        for start in STARTS if self.adds_space else ():
            begun, ids = self.encode(start), self.encode(start + text)
            if ids[: len(begun)] == begun:
                return ids[len(begun) :]
        return self.encode(text)


def close_completion(
    example: Example,
    texts: Texts | None,
    encoding: Encoding,
    template: ChatTemplate,
    end_ids: Sequence[int],
) -> MarkedIds:
    """The tokens of a completion, and which are trained on. This is the one place that decides what
    ends it.

    After a rendered prompt that is what the template closes the assistant's turn with. After a
    prompt taken as it is (`texts` is None) it is the end that the text has itself, or else the
    document's, the first of `end_ids`. Raises DataError for a completion that is not there, or that
    goes on after its end.
    """
    if example.completion is None:
        raise DataError(
            f'{example.name} has no completion, which objective.prefix = "dataset" needs; add '
            "the column"
        )
    ids: list[int] = []
    trained: list[bool] = []
    if texts is not None and texts.turns:
        closing = closing_ids(template, end_ids)
        so_far = texts.prompt
        for text, is_trained in texts.turns:
            turn = encoding.continuation(text)
            if is_trained:
                if ids:
                    _refuse_other_tokens(so_far, ids, texts, encoding, example)
                end_id = turn[-1] if turn[-1] in closing else end_ids[0]
                turn = (*turn[: _num_before_end(turn, closing, end_ids, example)], end_id)
            ids += turn
            trained += [is_trained] * len(turn)
            so_far += text
        return tuple(ids), tuple(trained)
    for text, is_trained in _segments(example):
        segment = encoding.continuation(text)
        ids += segment
        trained += [is_trained] * len(segment)
    closing = tuple(end_ids) if texts is None else closing_ids(template, end_ids)
    num = _num_before_end(ids, closing, end_ids, example)
    end_id = end_ids[0]
    if texts is None and num < len(ids):
        end_id = ids[num]
    elif texts is not None and template.end_id is not None:
        end_id = template.end_id
    return (*ids[:num], end_id), (*trained[:num], True)


def _refuse_other_tokens(
    so_far: str, ids: Sequence[int], texts: Texts, encoding: Encoding, example: Example
) -> None:
    """Raise DataError where what stands before a turn, as one text, has other tokens than turn by
    turn: a model that is to answer reads it as one text."""
    whole, parts = encoding.encode(so_far), (*encoding.encode(texts.prompt), *ids)
    if whole == parts:
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(whole, parts, strict=False)) if a != b),
        min(len(whole), len(parts)),
    )
    near = encoding.tokenizer.decode(list(whole[max(place - 3, 0) : place + 4]))
    raise DataError(
        f"{example.name}: a model that reads its turns as one text has other tokens near "
        f"{near!r}, where a turn begins or ends; mend the text there, or make a row of each turn "
        '(data.train_on = "last" trains on the last one)'
    )


def _num_before_end(
    ids: Sequence[int], closing: Sequence[int], end_ids: Sequence[int], example: Example
) -> int:
    """How many tokens come before the end that a text has, if it has one. Raises DataError if there
    are more after."""
    num = len(ids)
    while num and ids[num - 1] in closing:
        num -= 1
    if any(i in end_ids for i in ids[:num]):
        raise DataError(
            f"{example.name}: the completion goes on after an end token, and nothing follows an "
            "end; cut the text there, or make a row of each part"
        )
    return num


def _segments(example: Example) -> Sequence[tuple[str, bool]]:
    """The texts of a completion that is taken as it is."""
    answers = list(answers_of(example))
    if not answers:
        return example.completion  # pyright: ignore[reportReturnType]
    if len(answers) > 1 or set(answers[0]) != {"role", "content"}:
        raise DataError(
            f"{example.name}: its completion is of several messages, or has more than content, "
            'and its prompt is taken as it is; set data.template = "chat", or give the '
            "completion as a string"
        )
    return [(text_of(answers[0]), True)]


class Room(NamedTuple):
    """How long a prompt may be, and what becomes of one that is longer; None where no recipe can
    say."""

    max_completion: int
    context_length: int | None
    max_prompt_tokens: int | None
    too_long: TooLong | None

    def limit(self) -> int | None:
        in_context = (
            None if self.context_length is None else self.context_length - self.max_completion
        )
        return min((n for n in (in_context, self.max_prompt_tokens) if n is not None), default=None)

    def reason(self, num_tokens: int) -> str:
        if (
            self.context_length is not None
            and num_tokens + self.max_completion > self.context_length
        ):
            return (
                f"which with {self.max_completion} for the completion is more than the context of "
                f"{self.context_length}; shorten the prompt or lower the completion cap"
            )
        return (
            f"more than data.max_prompt_tokens = {self.max_prompt_tokens}; shorten the "
            "prompt or raise the limit"
        )


def fit_prompts(
    prompts: Sequence[Prompt], who: Literal["student", "teacher"], room: Room, encoding: Encoding
) -> list[Prompt]:
    """The prompts, of which the too long ones are refused, left out or cut at their beginning.
    Raises DataError."""
    limit = room.limit()
    too_long = [
        prompt for prompt in prompts if limit is not None and len(prompt.ids_of(who)) > limit
    ]
    if limit is None or not too_long:
        return list(prompts)
    num_tokens = len(too_long[0].ids_of(who))
    if room.too_long in ("refuse", None) or limit < 1:
        advice = "" if room.too_long is None else ', or set data.too_long to "drop" or "cut-left"'
        others = (
            f" ({len(too_long)} of {len(prompts)} prompts are too long)"
            if len(too_long) > 1
            else ""
        )
        raise DataError(
            f"{too_long[0].example.name} has {num_tokens} tokens, "
            f"{room.reason(num_tokens)}{advice}{others}"
        )
    if room.too_long == "cut-left":
        return [_cut(prompt, who, limit, encoding) for prompt in prompts]
    if len(too_long) == len(prompts):
        raise DataError(
            f"all {len(prompts)} prompts are too long, the first with {num_tokens} tokens, "
            f"{room.reason(num_tokens)}"
        )
    return [prompt for prompt in prompts if len(prompt.ids_of(who)) <= limit]


def _cut(
    prompt: Prompt, who: Literal["student", "teacher"], limit: int, encoding: Encoding
) -> Prompt:
    """A prompt that keeps its start and its last tokens."""
    ids = prompt.ids_of(who)
    if len(ids) <= limit:
        return prompt
    start = encoding.start_ids[:limit] if encoding.is_started(ids) else ()
    kept = start + ids[len(ids) - (limit - len(start)) :]
    num_cut = prompt.num_cut + len(ids) - limit
    return replace(
        prompt, **{"teacher_ids" if who == "teacher" else "token_ids": kept}, num_cut=num_cut
    )
