"""The process that renders chat templates: jinja's sandbox under limits of time and memory. It
knows no model.

A template is a program that came with a model. It may run for ever or fill the memory, and only a
process can be stopped. A line of standard input is a request (`templates._Worker` writes it); each
of its conversations is answered by a line: `{"text": ...}`, or `{"error": ...}`, after which the
rest of the request is not rendered.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

# Limits: characters of one conversation, and bytes of the process. The request says the seconds.
MAX_RENDERED_CHARACTERS = 2**24
RENDERER_BYTES = 2**30


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote; what it encloses is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own name)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller):
        return caller()


class Dict:
    """`dict` without the attributes of the class."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """jinja's own, without names that begin with `_`, through which a template could leave the
    sandbox."""

    def __init__(*args, **kwargs):
        self, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        _refuse_private(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _refuse_private(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold the name {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def compiled_template(text: str) -> jinja2.Template:
    """A template with what transformers gives one, but the clock."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "dict": Dict(), "namespace": Namespace}
    return environment.from_string(text)


def answers(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One for each conversation of a request, up to the first that fails."""
    today = datetime.datetime.fromisoformat(request["today"])
    for conversation in request["conversations"]:
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            template = compiled_template(request["templates"][conversation.pop("template")])
            text = template.render(
                **request["variables"], **conversation, strftime_now=today.strftime
            )
            if len(text) > MAX_RENDERED_CHARACTERS:
                answer = {
                    "error": f"writes more than {MAX_RENDERED_CHARACTERS:,} characters",
                    "is_limit": True,
                }
            else:
                answer = {"text": text}
        except MemoryError:
            answer = {"error": f"needs more than {RENDERER_BYTES >> 20:,} MiB", "is_limit": True}
        # A template can raise anything; whatever it is, there is no text.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            answer = {"error": f"refuses: {reason}", "is_limit": False}
        signal.setitimer(signal.ITIMER_PROF, 0)
        yield answer
        if "error" in answer:
            return


def answer_requests() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (RENDERER_BYTES, RENDERER_BYTES))
    for line in sys.stdin.buffer:
        for answer in answers(json.loads(line)):
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    answer_requests()
