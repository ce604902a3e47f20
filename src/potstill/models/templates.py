"""Chat templates: rendered by a process that cannot hang, with a date that stays; what they take,
and how turns end."""

import atexit
import contextlib
import datetime
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from potstill.console.printable import error_text
from potstill.types import DataError, Message

# Seconds of the processor for one conversation.
CONVERSATION_SECONDS = 2.0
# Conversations that the process is given at once.
REQUEST_SIZE = 256
# Texts, or ends of texts, with which a template is tried out. The space shows whether texts are
# trimmed.
PROBE = "potstill"
GOES_ON = "potstill-goes-on-here "
# Names under which a message's reasoning goes; transformers gives it to templates under the first
# two.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Names that every template is given, so no argument may have them.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "template")


class TemplateError(ValueError):
    """A conversation that a template does not render: its place in the list, and whether a limit
    was met."""

    def __init__(self, reason: str, place: int = 0, is_limit: bool = False):
        super().__init__(reason)
        self.place, self.is_limit = place, is_limit


class Conversation(NamedTuple):
    """Messages to render, with the tools that may be called.

    ending = "open": the assistant is to answer; "closed": nothing follows; "continued": the last
    message goes on.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    ending: Literal["open", "closed", "continued"] = "open"


class ChatTemplate:
    """A tokenizer's chat template with all that its texts depend on beside the messages: arguments
    and a date."""

    def __init__(
        self, tokenizer, arguments: Mapping[str, Any] | None = None, date: str | None = None
    ):
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.date = date or today()
        if taken := sorted(self.arguments.keys() & set(GIVEN)):
            raise DataError(
                f"{taken[0]!r} is given to every template; remove it from data.template_arguments"
            )

    def render(self, conversations: Sequence[Conversation]) -> list[str]:
        """The text of each. Raises TemplateError."""
        texts = self._render([self._with_content(conversation) for conversation in conversations])
        return [
            _up_to_mark(text, place) if conversation.ending == "continued" else text
            for place, (conversation, text) in enumerate(zip(conversations, texts, strict=True))
        ]

    @functools.cached_property
    def wants_parts(self) -> bool:
        """Whether a text is lost on the template that is no list of parts."""
        return not self._shows(PROBE) and self._shows(as_parts(PROBE))

    @functools.cached_property
    def end_id(self) -> int | None:
        """The token that closes the assistant's last turn: the first special one after its words,
        or None."""
        return self._closing([_user("a"), _assistant(PROBE)])

    @functools.cached_property
    def middle_end_id(self) -> int | None:
        """The same of a turn that others follow."""
        return self._closing([_user("a"), _assistant(PROBE), _user("b")])

    def unread_arguments(self) -> list[str]:
        """Names of arguments that stand nowhere in the template."""
        return [
            name
            for name in self.arguments
            if not re.search(rf"\b{re.escape(name)}\b", str(self.tokenizer.chat_template))
        ]

    def _closing(self, messages: list[Message]) -> int | None:
        try:
            (text,) = self.render([Conversation(messages, ending="closed")])
        except TemplateError as error:
            if error.is_limit:
                raise
            return None
        _, probe, after = text.rpartition(PROBE)
        if not probe:
            return None
        tokenizer = self.tokenizer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        if tokenizer.bos_token_id != tokenizer.eos_token_id:
            special -= {tokenizer.bos_token_id}
        return next(
            (i for i in tokenizer.encode(after, add_special_tokens=False) if i in special), None
        )

    def _shows(self, content: Any) -> bool:
        try:
            return PROBE in self._render([Conversation([{"role": "user", "content": content}])])[0]
        except TemplateError as error:
            if error.is_limit:
                raise
            return False

    def _with_content(self, conversation: Conversation) -> Conversation:
        """Content as the template takes it, with a mark at its end where the last message goes
        on."""
        messages = [_with_reasoning(message) for message in conversation.messages]
        if conversation.ending == "continued":
            messages[-1] = messages[-1] | {"content": text_of(messages[-1]) + GOES_ON}
        for message in messages:
            if "content" in message:
                text = text_of(message)
                message["content"] = as_parts(text) if self.wants_parts else text
        return conversation._replace(messages=messages)

    def _render(self, conversations: Sequence[Conversation]) -> list[str]:
        texts = [self._text(conversation.tools) for conversation in conversations]
        templates = list(dict.fromkeys(texts))
        request = {
            "today": self.date,
            "seconds": CONVERSATION_SECONDS,
            "templates": templates,
            "variables": self.tokenizer.special_tokens_map | self.arguments,
        }
        rendered: list[str] = []
        for first in range(0, len(conversations), REQUEST_SIZE):
            batch = [
                {
                    "template": templates.index(text),
                    "messages": conversation.messages,
                    "tools": conversation.tools,
                    "documents": None,
                    "add_generation_prompt": conversation.ending == "open",
                }
                for conversation, text in zip(
                    conversations[first : first + REQUEST_SIZE],
                    texts[first : first + REQUEST_SIZE],
                    strict=True,
                )
            ]
            for answer in _worker(os.getpid()).ask(request | {"conversations": batch}, len(batch)):
                if "error" in answer:
                    raise TemplateError(answer["error"], len(rendered), answer["is_limit"])
                rendered.append(answer["text"])
        return rendered

    def _text(self, tools: Any) -> str:
        try:
            return self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            raise TemplateError(f"cannot be chosen: {error_text(error)}") from None


def today() -> str:
    """The date that templates are told when a run or a cache begins."""
    return datetime.date.today().isoformat()


def text_of(message: Message) -> str:
    """The text of a message, which may be a list of text parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def as_parts(text: str) -> list[dict[str, str]]:
    """A text as the list of parts that some templates want."""
    return [{"type": "text", "text": text}]


def lost(conversation: Conversation, rendered: str, num_given: int) -> str | None:
    """The part of a conversation that stands nowhere in its rendering, in words; None if all is
    there.

    A template may drop the reasoning of the first `num_given` messages, and what stands before
    `</think>` in them.
    """
    for place, message in enumerate(conversation.messages):
        text = text_of(message)
        if message["role"] == "assistant" and place < num_given:
            text = text.rpartition("</think>")[2]
        parts = [("content", text)]
        parts += [("tool call", _name_of(call)) for call in message.get("tool_calls") or ()]
        if place >= num_given:
            parts += [("reasoning", message[key]) for key in REASONING if message.get(key)]
        for what, value in parts:
            if not _stands_in(value, rendered):
                return f"the {what} of message {place} (by {message['role']!r})"
    for tool in conversation.tools or ():
        if not _stands_in(_name_of(tool), rendered):
            return f"the tool {_name_of(tool)!r}"
    return None


def _name_of(tool: Mapping[str, Any]) -> str:
    """The name of a tool, or of the tool that a call is for."""
    return tool.get("function", tool).get("name", "")


def _stands_in(text: Any, rendered: str) -> bool:
    """Whether a text is there, be it as JSON, trimmed or otherwise spaced."""
    text = str(text)
    if text.strip() in rendered:
        return True
    forms = (text, json.dumps(text), json.dumps(text, ensure_ascii=False))
    letters = "".join(filter(str.isalnum, rendered))
    return any("".join(filter(str.isalnum, form)) in letters for form in forms)


def _with_reasoning(message: Message) -> Message:
    """A message without nulls, and with its reasoning under the names that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def _up_to_mark(text: str, place: int) -> str:
    """A rendering up to where its last message goes on."""
    before, mark, after = text.rpartition(GOES_ON.strip())
    if not mark:
        raise TemplateError("drops the assistant's last words, so they cannot be continued", place)
    # A template that took the mark's space also took the spaces that stood before it.
    return before if after.startswith(" ") else before.rstrip()


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


class _Worker:
    """The process that renders; it has no terminal, and ends with this one."""

    def __init__(self):
        self.process = subprocess.Popen(
            # -P: the current folder may be a model's that came from elsewhere, and its files are no
            # modules of ours.
            [sys.executable, "-P", "-m", "potstill.models.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def ask(self, request: dict[str, Any], num_answers: int) -> list[dict[str, Any]]:
        """The answers to a request, up to the first error. A process that died, or was left early,
        is replaced."""
        assert self.process.stdin is not None and self.process.stdout is not None
        answers: list[dict[str, Any]] = []
        is_whole = False
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write((json.dumps(request) + "\n").encode())
                self.process.stdin.flush()
            while len(answers) < num_answers:
                line = self.process.stdout.readline()
                answers.append(json.loads(line) if line else self._why_it_died())
                if "error" in answers[-1]:
                    break
            is_whole = self.process.poll() is None
        finally:
            if not is_whole:
                self.close()
        return answers

    def _why_it_died(self) -> dict[str, Any]:
        if self.process.wait() == -signal.SIGPROF:
            return {
                "error": f"takes more than {CONVERSATION_SECONDS:g} s for one conversation",
                "is_limit": True,
            }
        return {"error": f"ends its process (code {self.process.returncode})", "is_limit": True}

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        _worker.cache_clear()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]


@functools.cache
def _worker(pid: int) -> _Worker:
    """That of this process; one that was forked needs its own."""
    worker = _Worker()
    atexit.register(worker.close)
    return worker
