"""Chat examples as texts: the prompt, and the completion in turns, of which the assistant's are
trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from potstill.models.templates import ChatTemplate, Conversation, TemplateError, lost, text_of
from potstill.prompts.system import has_own_system
from potstill.types import SYSTEM_ROLES, DataError, Example, Message

# Takes the place of a message's content, to see where that message begins; no text begins with it.
OTHER = "\ue000"


class Texts(NamedTuple):
    """A rendered example: its prompt, and the (text, is it trained on) turns of a completion that
    is of messages."""

    prompt: str
    turns: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chat:
    """An example as a conversation: what is given as the prompt, and all messages, those from
    `first` on answers.

    Where what is given ends with words of the assistant's, these and the completion are one
    message.
    """

    example: Example
    given: tuple[Message, ...]
    messages: tuple[Message, ...]
    first: int

    def prompt(self) -> Conversation:
        is_continued = self.given[-1]["role"] == "assistant"
        return Conversation(self.given, self.example.tools, "continued" if is_continued else "open")

    def before(self, place: int) -> Conversation:
        """The conversation that is there when the assistant is to write the message at a place."""
        return Conversation(self.messages[:place], self.example.tools)

    def whole(self) -> Conversation:
        return Conversation(self.messages, self.example.tools, "closed")

    def refuse(self, reason: str) -> DataError:
        return DataError(f"{self.example.name}: the chat template {reason}")


def make_chat(example: Example) -> Chat:
    """The conversation of an example; a prompt that is a string is what a user says."""
    given = (
        ({"role": "user", "content": example.prompt},)
        if isinstance(example.prompt, str)
        else example.prompt
    )
    if example.system is not None and not has_own_system(example):
        given = ({"role": "system", "content": example.system}, *given)
    answers = answers_of(example)
    if given[-1]["role"] != "assistant" or not answers:
        return Chat(example=example, given=given, messages=(*given, *answers), first=len(given))
    words = text_of(given[-1]) + text_of(answers[0])
    joined = given[-1] | answers[0] | {"content": words}
    return Chat(
        example=example,
        given=given,
        messages=(*given[:-1], joined, *answers[1:]),
        first=len(given) - 1,
    )


def answers_of(example: Example) -> tuple[Message, ...]:
    """The messages of a completion that is of messages; else none."""
    return tuple(part for part in example.completion or () if isinstance(part, dict))


def render_examples(
    examples: Sequence[Example], template: ChatTemplate, end_ids: Sequence[int] | None
) -> list[Texts]:
    """Each example's prompt; with the `end_ids` of a run also its turns, where its completion is of
    messages.

    Raises DataError that names the example.
    """
    chats = [make_chat(example) for example in examples]
    prompts = _render(chats, [chat.prompt() for chat in chats], template)
    places = [
        place
        for place, chat in enumerate(chats)
        if end_ids is not None and answers_of(chat.example)
    ]
    answered = [chats[place] for place in places]
    wholes = _render(answered, [chat.whole() for chat in answered], template)
    whole_at = dict(zip(places, wholes, strict=True))
    closing = tuple(
        map(template.tokenizer.convert_ids_to_tokens, closing_ids(template, end_ids or ()))
    )
    texts = []
    for place, (chat, prompt) in enumerate(zip(chats, prompts, strict=True)):
        whole = whole_at.get(place)
        texts.append(
            Texts(prompt, () if whole is None else _turns(chat, prompt, whole, template, closing))
        )
    return texts


def closing_ids(template: ChatTemplate, end_ids: Sequence[int]) -> tuple[int, ...]:
    """Ids that may close an assistant's turn: the template's own, in the middle or at the end, or
    an end token."""
    own = [i for i in (template.end_id, template.middle_end_id) if i is not None]
    return tuple(dict.fromkeys((*own, *end_ids)))


def _render(
    chats: Sequence[Chat], conversations: Sequence[Conversation], template: ChatTemplate
) -> list[str]:
    try:
        texts = template.render(conversations)
    except TemplateError as error:
        chat, conversation = chats[error.place], conversations[error.place]
        raise chat.refuse(_why_refused(conversation, template, error)) from None
    except TypeError as error:
        raise DataError(f"messages or tools hold what JSON cannot: {error}") from None
    for chat, conversation, text in zip(chats, conversations, texts, strict=True):
        if what := lost(conversation, text, chat.first):
            raise chat.refuse(f"drops {what}; use messages that it takes, or another template")
    return texts


def _why_refused(conversation: Conversation, template: ChatTemplate, error: TemplateError) -> str:
    """The template's reason; where it would render the rest, that it takes no system message."""
    first, *others = conversation.messages
    if error.is_limit or first["role"] not in SYSTEM_ROLES or not others:
        return f"{error}"
    try:
        template.render([conversation._replace(messages=others)])
    except TemplateError:
        return f"{error}"
    return (
        f"takes no {first['role']} message (it {error}); leave data.system or that message out, "
        "or put its words into what the user says"
    )


def _turns(
    chat: Chat, prompt: str, whole: str, template: ChatTemplate, closing: Sequence[str]
) -> tuple[tuple[str, bool], ...]:
    """The texts that the template writes after the prompt, up to the end of the assistant's last
    turn.

    A turn of the assistant's begins where the template would have it begin to write, and ends after
    the last closing token before the next message. Raises DataError for a template that writes the
    same turn in two ways.
    """
    places = [
        i for i in range(chat.first, len(chat.messages)) if chat.messages[i]["role"] == "assistant"
    ]
    turns: list[tuple[str, bool]] = []
    done = len(prompt)
    for place in places:
        before = (
            prompt if place == chat.first else _render([chat], [chat.before(place)], template)[0]
        )
        if not whole.startswith(before):
            raise chat.refuse(_two_ways(before, whole))
        start, bound = len(before), _next_start(chat, place, whole, template)
        ends = [
            whole.rfind(token, start, bound) + len(token)
            for token in closing
            if token in whole[start:bound]
        ]
        if not ends and place != places[-1]:
            raise chat.refuse(
                f"does not close the assistant's message {place}, so what is its is not known"
            )
        end = max(ends, default=len(whole.rstrip()))
        turns += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    return tuple(turn for turn in turns if turn[0])


def _next_start(chat: Chat, place: int, whole: str, template: ChatTemplate) -> int:
    """Where the content of the message after a place begins, or what stands before it; the end
    after the last."""
    if place + 1 == len(chat.messages):
        return len(whole)
    following = chat.messages[place + 1]
    if following["role"] == "assistant":
        return len(_render([chat], [chat.before(place + 1)], template)[0])
    messages = (
        *chat.messages[: place + 1],
        following | {"content": OTHER},
        *chat.messages[place + 2 :],
    )
    (other,) = _render([chat], [chat.whole()._replace(messages=messages)], template)
    return _num_common(whole, other)


def _two_ways(before: str, whole: str) -> str:
    same = _num_common(before, whole)
    return (
        f"writes {before[same : same + 40]!r} before an answer that is to come and "
        f"{whole[same : same + 40]!r} where the answer is there; give the completion as a "
        "string, which is taken as it is, or set data.template_arguments"
    )


def _num_common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
