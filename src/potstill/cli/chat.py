"""The work of `potstill chat`: a conversation with a model, which answers line by line."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from potstill.cli.usage import UsageError
from potstill.config import Sampling
from potstill.console.boundary import Stopped, naming
from potstill.console.printable import say, say_on
from potstill.models.language_model import LanguageModel
from potstill.models.probe import ready
from potstill.models.sampling import sample
from potstill.models.templates import ChatTemplate
from potstill.prompts.examples import make_prompts
from potstill.seeds import Stream, stream_key
from potstill.teachers.ends import end_set
from potstill.teachers.rope import refuse_crossing
from potstill.teachers.vocabulary import num_named_rows
from potstill.types import DataError, Example, Message, ModelError

KEYS = "/new begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"
# Stands for the bytes of a character of which others are still to come.
UNFINISHED = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A model that answers, and all that its answers depend on beside what is said."""

    model: LanguageModel
    sampling: Sampling
    seed: int
    max_tokens: int
    template_arguments: Mapping[str, Any]

    @property
    def has_template(self) -> bool:
        return bool(self.model.tokenizer.chat_template)

    def token_ids(self, said: str | tuple[Message, ...]) -> tuple[int, ...]:
        """A conversation whose last turn is the user's, or a text, as the model reads it. Raises
        DataError."""
        (prompt,) = make_prompts(
            [Example(id="of this turn", prompt=said)],
            self.model.tokenizer,
            template=None,
            max_completion=0,
            context_length=None,
            template_arguments=self.template_arguments,
        )
        return prompt.token_ids


def converse(
    name: str,
    *,
    system: str | None,
    max_tokens: int,
    seed: int,
    sampling: Sampling,
    template_arguments: Mapping[str, Any],
) -> None:
    """Answer each line of standard input until it ends; answers go to standard output, all else to
    standard error.

    Raises UsageError or DataError for what the model's template does not take.
    """
    speaker = Speaker(
        model=ready(name, device=torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        sampling=sampling,
        seed=seed,
        max_tokens=max_tokens,
        template_arguments=template_arguments,
    )
    _open(speaker, name, system)
    first = () if system is None else (_message("system", system),)
    # Refuses what the template does not take before anything is asked.
    if speaker.has_template:
        speaker.token_ids((*first, _message("user", "a")))
    messages, turn = first, 0
    for line in _lines():
        if line.strip() == "/exit":
            break
        if line.strip() == "/new":
            messages = first
            _note("a new conversation")
        elif line.strip():
            asked = (*messages, _message("user", line)) if speaker.has_template else line
            answer, turn = _answer(speaker, asked, turn), turn + 1
            if answer and not isinstance(asked, str):
                messages = (*asked, _message("assistant", answer))


def _open(speaker: Speaker, name: str, system: str | None) -> None:
    """Say how the model will be asked. Raises UsageError for what only a template could read."""
    if speaker.has_template:
        template = ChatTemplate(speaker.model.tokenizer, speaker.template_arguments)
        if unread := template.unread_arguments():
            _note(f"warning: the chat template reads no argument {', '.join(map(repr, unread))}")
        say(f"{name} answers; {KEYS}", error=True)
        return
    options = {"--system": system, "--template-arguments": speaker.template_arguments}
    for option, value in options.items():
        if value:
            raise UsageError(
                f"{option} is for a chat template, and model {name!r} has none; leave it out"
            )
    say(
        f"{name} has no chat template: each line is completed as plain text, by itself",
        KEYS,
        error=True,
    )


def _answer(speaker: Speaker, said: str | tuple[Message, ...], turn: int) -> str:
    """Print an answer as it is written, and return it; empty where there was none, which is said.

    An answer that is cut is part of the conversation as far as it came.
    """
    written = _Written(speaker.model)
    try:
        reason = _write(speaker, speaker.token_ids(said), turn, written)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Stopped):
            raise
        reason = "stopped"
    except (DataError, ModelError) as error:
        _note(f"{error}; this turn is left out")
        return ""
    written.finish()
    if reason is not None:
        _note(reason)
    if not written.text:
        _note("the answer is empty; this turn is left out")
    return written.text


def _write(
    speaker: Speaker, token_ids: tuple[int, ...], turn: int, written: "_Written"
) -> str | None:
    """Decode an answer; why it was cut, or None where the model ended it. Raises DataError where
    the context has no room for one."""
    model, context = speaker.model, speaker.model.context_length
    room = speaker.max_tokens if context is None else context - len(token_ids)
    if room < 1:
        raise DataError(
            f"the conversation has {len(token_ids)} tokens and fills the context of {context}; "
            "/new begins anew"
        )
    num = min(room, speaker.max_tokens)
    refuse_crossing(model, [token_ids], num, "--max-tokens")
    (completion,) = sample(
        model.model,
        [token_ids],
        [stream_key((speaker.seed, turn, 0), Stream.CHAT)],
        max_tokens=num,
        end_ids=end_set(model),
        sampling=speaker.sampling,
        vocab_size=num_named_rows(model),
        on_token=lambda _, token_id: written.add(token_id),
    )
    if completion.stop == "end":
        return None
    if num < speaker.max_tokens:
        return f"cut: the context of {context} tokens is full; /new begins anew"
    return f"cut after {num} tokens; --max-tokens allows more"


class _Written:
    """The text of an answer, printed as far as its characters are whole.

    An end token is no part of it, be it a special token or not.
    """

    def __init__(self, model: LanguageModel):
        self.tokenizer = model.tokenizer
        self.end_ids = end_set(model)
        self.token_ids: list[int] = []
        self.num_printed = 0

    @property
    def text(self) -> str:
        return self.tokenizer.decode(
            self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def add(self, token_id: int) -> None:
        if token_id not in self.end_ids:
            self.token_ids.append(token_id)
            self._print_up_to(self.text.rstrip(UNFINISHED))

    def finish(self) -> None:
        """Print what is left, with characters that never became whole."""
        self._print_up_to(self.text)
        say("")

    def _print_up_to(self, text: str) -> None:
        say_on(text[self.num_printed :])
        self.num_printed = max(self.num_printed, len(text))


def _lines() -> Iterator[str]:
    """The lines that a user types or a pipe holds, without their ends."""
    if not sys.stdin.isatty():
        with naming("standard input"):
            for line in sys.stdin:
                yield line.rstrip("\n")
        return
    with suppress(ImportError):
        # Gives `input` its history and the keys that edit a line.
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt as stop:
            if isinstance(stop, Stopped):
                raise
            _note(KEYS)
            continue
        yield line


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _note(text: str) -> None:
    say(f"({text})", error=True)
