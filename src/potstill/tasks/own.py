"""A task or a judge of the user's own: a class or function in a local Python file, named by a
source such as `my_task.py:MyTask`.

The file's code is run with all rights of the command, so only a file that a recipe or a command
names is read, and nothing beside it: neither its folder's other modules nor compiled code. All that
the class gives is checked, since whatever is wrong with it must be a line that names the file,
before a run writes anything.
"""

import dataclasses
import hashlib
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from potstill.answers.grading import Grade
from potstill.files import file_digest
from potstill.tasks.tables import with_own_ids
from potstill.types import DataError, Example

MEMBERS = ("examples", "grade", "answer_end")
# A message shows so many characters of the user's values and errors.
ERROR_CHARACTERS = 120


def own_task(source: str | Sequence[str] | None) -> tuple[str, str] | None:
    """File and class of a source such as "my_task.py:MyTask", a task of the user's own; None for
    other sources."""
    if not isinstance(source, str):
        return None
    if source.endswith(".py"):
        return source, ""
    file, mark, name = source.partition(".py:")
    return (f"{file}.py", name) if mark else None


class OwnTask:
    """A class of the user's as a task. Raises DataError for whatever is wrong with it, with the
    file's line."""

    def __init__(self, source: str):
        code, file, name, text = _compiled(source)
        self.file, self.name = file, name
        with _naming_the_line(self.file, f"{file} cannot be run"):
            made = getattr(_module(code, file, text), name, None)
        if not isinstance(made, type):
            raise DataError(f"{file} has no class {name!r}; {_those_of(_module(code, file, text))}")
        for member in MEMBERS:
            if not callable(getattr(made, member, None)):
                raise DataError(
                    f"{file}: {name} has no method {member!r}; a task has {', '.join(MEMBERS)}"
                )
        with _naming_the_line(self.file, f"{file}: {name}() cannot be made"):
            self.task = made()

    def examples(self, split: str, num_examples: int, seed: int) -> list[Example]:
        """The class's examples, each checked; of doubled ids all begin with their place."""
        with _naming_the_line(self.file, self._method("examples")):
            made = self.task.examples(split, num_examples, seed)
        if not isinstance(made, list | tuple):
            raise self._wrong("examples", made, "a list of potstill.Example")
        if len(made) != num_examples:
            raise DataError(
                f"{self._method('examples')} returned {len(made)} examples where {num_examples} "
                "were asked for; return as many, or ask for fewer with data.num_prompts or "
                "evaluation.num_problems"
            )
        for i, example in enumerate(made):
            if fault := _fault(example):
                raise DataError(f"{self._method('examples')} returned examples[{i}], {fault}")
        self.answer_end("")
        return with_own_ids([_frozen(example) for example in made])

    def grade(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Grade]:
        """The class's grades, each checked."""
        with _naming_the_line(self.file, self._method("grade")):
            grades = self.task.grade(examples, responses)
        if not isinstance(grades, list | tuple) or len(grades) != len(responses):
            raise self._wrong(
                "grade", grades, f"a list of {len(responses)} potstill.Grade, one a response"
            )
        for grade in grades:
            if not isinstance(grade, Grade):
                raise self._wrong("grade", grade, "a potstill.Grade for each response")
            is_number = isinstance(grade.score, int | float) and 0 <= grade.score <= 1
            if (
                not is_number
                or not isinstance(grade.answer, str | None)
                or not isinstance(grade.note, str)
            ):
                raise self._wrong(
                    "grade", grade, "a score from 0 to 1, and texts or None for the rest"
                )
        return [dataclasses.replace(grade, score=float(grade.score)) for grade in grades]

    def answer_end(self, response: str) -> int | None:
        """The class's end of the first final answer, checked."""
        with _naming_the_line(self.file, self._method("answer_end")):
            end = self.task.answer_end(response)
        if end is not None and (type(end) is not int or not 0 <= end <= len(response)):
            raise self._wrong(
                "answer_end", end, f"None, or a number of characters from 0 to {len(response)}"
            )
        return end

    def _method(self, name: str) -> str:
        return f"{self.file}: {self.name}.{name}"

    def _wrong(self, method: str, value: Any, wanted: str) -> DataError:
        return DataError(f"{self._method(method)} returned {_shown(value)}; return {wanted}")


class OwnFunction:
    """A function of the user's own, named such as `my_weights.py:weights`; `such_as` is a name for
    a message.

    Raises DataError for whatever is wrong with it, with the file's line.
    """

    def __init__(self, source: str, such_as: str):
        code, self.file, self.name, text = _compiled(source, "function", such_as)
        self.source, self.what = source, f"{self.file}: {self.name}"
        with _naming_the_line(self.file, f"{self.file} cannot be run"):
            found = getattr(_module(code, self.file, text), self.name, None)
        if not callable(found):
            raise DataError(f"{self.file} has no function {self.name!r}; write it, or name another")
        self.function = found

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Call the function, and name its line in whatever it raises."""
        with _naming_the_line(self.file, self.what):
            return self.function(*given, **named)


class OwnJudge:
    """A function of the user's that scores responses, named such as `my_judge.py:helpful`. It takes
    a list of potstill.Example and one of responses, and returns a number for each.

    Raises DataError for whatever is wrong with it, with the file's line.
    """

    def __init__(self, source: str):
        if own_task(source) is None:
            raise DataError(
                f"the judge is {source!r}; name a function in a Python file of yours, as in "
                "my_judge.py:helpful"
            )
        self.source, self.function = source, OwnFunction(source, "helpful")

    def grade(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Grade]:
        """The function's scores, each checked."""
        what = self.function.what
        scores = self.function(list(examples), list(responses))
        if not isinstance(scores, list | tuple) or len(scores) != len(responses):
            raise DataError(
                f"{what} returned {_shown(scores)}; return a list of {len(responses)} numbers, one "
                "a response"
            )
        for score in scores:
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise DataError(f"{what} returned {_shown(score)}; return a number a response")
        return [Grade(float(score), None) for score in scores]


@contextmanager
def _naming_the_line(file: str, what: str) -> Iterator[None]:
    """Raise a DataError for any error of the user's code, with the last of its lines that was
    reached."""
    try:
        yield
    # Any error can come from code that is not ours, and sys.exit() in it must not look like
    # success.
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == file
        ]
        where = f"{what}: line {lines[-1]} raised" if lines else f"{what}: it raised"
        text = " ".join(str(error).split())[:ERROR_CHARACTERS]
        raise DataError(
            f"{where} {type(error).__name__}{text and ': '}{text}; mend the file"
        ) from error


def own_files(*sources: str | Sequence[str] | None) -> dict[str, str]:
    """The SHA-256 of each file of the user's own whose code these sources run, by its path as they
    write it.

    A file that is not there is left out.
    """
    files = [found[0] for source in sources if (found := own_task(source)) is not None]
    return {file: file_digest(Path(file)) for file in dict.fromkeys(files) if Path(file).is_file()}


def describe_files(files: dict[str, str]) -> list[str]:
    """A line for each such file, to say that its code is run."""
    return [
        f"the code of {file} is run (SHA-256 {sha256[:16]}...)" for file, sha256 in files.items()
    ]


def check_file(source: str) -> None:
    """Raise DataError for a source of the user's own whose file cannot be read or is no Python.
    Runs nothing."""
    _compiled(source)


def _compiled(
    source: str, kind: str = "class", such_as: str = "MyTask"
) -> tuple[CodeType, str, str, bytes]:
    """The code of a source's file, the file, the name in it that is meant, and the file's text.
    Runs nothing."""
    found = own_task(source)
    assert found is not None, "the caller asks for a task of the user's own"
    file, name = found
    if not name.isidentifier():
        raise DataError(
            f"{source!r} names no {kind}; write it after the file, as in {file}:{such_as}"
        )
    path = Path(file)
    if not path.is_file():
        raise DataError(
            f"{file} {'is a folder' if path.is_dir() else 'does not exist'}; give a Python file "
            "of yours"
        )
    try:
        text = path.read_bytes()
        # Not from __pycache__, which can be of another file.
        return compile(text, file, "exec", dont_inherit=True), file, name, text
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}; give a Python file that can"
        ) from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise DataError(f"{file}{line} is no Python: {what}; mend the file") from None


@cache
def _module(code: CodeType, file: str, text: bytes) -> ModuleType:
    """The file's module, run once for each text that the file has had in this process."""
    name = f"potstill_own_{hashlib.sha256(file.encode() + text).hexdigest()[:16]}"
    module = ModuleType(name)
    module.__file__ = file
    # Where dataclasses and pickle look for the module of a class.
    sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _those_of(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
    ]
    classes = [name for name in names if isinstance(vars(module)[name], type)]
    return f"choose one of {', '.join(classes)}" if classes else "it has none; write one"


def _fault(example: Any) -> str | None:
    """The reason why a value is no example that can be used; None where it is one."""
    if not isinstance(example, Example):
        return f"{_shown(example)}; return a list of potstill.Example"
    if not isinstance(example.id, str) or not isinstance(example.level, str):
        return f"whose id is {_shown(example.id)} and level {_shown(example.level)}; both are texts"
    if not isinstance(example.answer, str | None):
        return f"whose answer is {_shown(example.answer)}; it is a text or None"
    if not _is_prompt(example.prompt):
        return (
            f"whose prompt is {_shown(example.prompt)}; it is a text or a list of messages, "
            "and not empty"
        )
    if example.teacher_prompt is not None and not _is_prompt(example.teacher_prompt):
        return (
            f"whose teacher_prompt is {_shown(example.teacher_prompt)}; it is a text, a list "
            "of messages or None"
        )
    if example.completion is not None and not (
        _is_segments(example.completion) or _is_messages(example.completion)
    ):
        return (
            f"whose completion is {_shown(example.completion)}; it is a list of (text, is it "
            "trained on) or None"
        )
    return None


def _is_prompt(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or _is_messages(value)


def _is_messages(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) > 0
    return is_list and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) for item in value
    )


def _is_segments(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and all(isinstance(item, tuple) for item in value)
    return is_list and all([type(part) for part in item] == [str, bool] for item in value)


def _frozen(example: Example) -> Example:
    """The example with tuples where the user has written lists."""
    lists = ("prompt", "teacher_prompt", "completion")
    given = {name: value for name in lists if isinstance(value := getattr(example, name), list)}
    return dataclasses.replace(example, **{name: tuple(value) for name, value in given.items()})


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= ERROR_CHARACTERS else f"{text[:ERROR_CHARACTERS]}..."
