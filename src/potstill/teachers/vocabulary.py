"""The rows of two heads that one loss is over, and one draw: ids that both tokenizers agree on."""

from collections.abc import Iterable

from potstill.models.language_model import LanguageModel
from potstill.teachers.protocol import Teacher
from potstill.types import DataError, ModelError, Prompt

# So many tokens are shown of a list.
NUM_SHOWN_TOKENS = 3


def shared_vocab_size(student: LanguageModel, teacher: Teacher) -> int:
    """How many rows the two heads share, which is what the loss is over and what is drawn from.

    Rows beyond the tokenizers' ids are padding, and the larger head is cut. Tokens that were added
    to one tokenizer alone, after all that they have in common, are cut off as well;
    `unshared_tokens` names them. Raises ModelError that names the first ids which differ otherwise,
    and for a model all of whose ends are cut off.
    """
    tokens = [
        {i: token for token, i in each.tokenizer.get_vocab().items()} for each in (student, teacher)
    ]
    mine, theirs = tokens
    agreed = [i for i, token in mine.items() if theirs.get(i) == token]
    differing = sorted((mine.keys() | theirs.keys()) - set(agreed))
    added, last_shared = unshared_tokens(student, teacher), max(agreed, default=-1)
    if any((i in mine and i in theirs) or i not in added or i < last_shared for i in differing):
        shown = ", ".join(
            f"{i}: {mine.get(i)!r} / {theirs.get(i)!r}" for i in differing[:NUM_SHOWN_TOKENS]
        )
        raise ModelError(
            f"the tokenizers of student {student.name!r} and teacher {teacher.name!r} differ at "
            f"{len(differing)} ids (student / teacher: {shown}); a token-level KL needs one "
            "vocabulary: choose models of one family"
        )
    size = min(student.vocab_size, teacher.vocab_size, *differing)
    if last_shared >= size:
        raise ModelError(
            f"token id {last_shared} has no row in a head of {size}; the model folder is "
            "inconsistent"
        )
    for model in (student, teacher):
        if model.end_ids and min(model.end_ids) >= size:
            name = model.tokenizer.convert_ids_to_tokens(model.end_ids[0])
            raise ModelError(
                f"{model.name!r} ends with {name!r} ({model.end_ids[0]}), which is not among the "
                f"{size} vocabulary rows that student and teacher share; nothing could learn to "
                "end so: change eos_token_id in its generation_config.json or choose models of "
                "one family"
            )
    return size


def unshared_tokens(student: LanguageModel, teacher: Teacher) -> dict[int, str]:
    """The tokens by their ids that were added to one tokenizer, and for which the other has
    nothing."""
    alone: dict[int, str] = {}
    for model, other in ((student, teacher), (teacher, student)):
        known = other.tokenizer.get_vocab()
        alone |= {
            i: token for token, i in model.tokenizer.get_added_vocab().items() if token not in known
        }
    return dict(sorted(alone.items()))


def refuse_unshared_ids(prompts: Iterable[Prompt], size: int, tokenizer) -> None:
    """Raise DataError for a text with a token that is cut off, where both models are to read it."""
    for prompt in prompts:
        read = prompt.token_ids if prompt.teacher_ids is None else ()
        beyond = next((i for i in (*read, *(prompt.completion_ids or ())) if i >= size), None)
        if beyond is not None:
            raise DataError(
                f"prompt {prompt.example.id!r} has the token "
                f"{tokenizer.convert_ids_to_tokens(beyond)!r} ({beyond}), which is not among the "
                f"{size} vocabulary rows that student and teacher share; leave that text out"
            )


def describe_cut(student: LanguageModel, teacher: Teacher, size: int) -> list[str]:
    """Lines on what is cut off two heads; none where nothing is."""
    lines = []
    if (student.vocab_size, teacher.vocab_size) != (size, size):
        lines.append(
            f"heads of {student.vocab_size} (student) and {teacher.vocab_size} (teacher) rows "
            f"are cut to the {size} they share, in the loss and in what is drawn"
        )
    if alone := unshared_tokens(student, teacher):
        names = list(alone.values())
        shown = ", ".join(map(repr, names[:NUM_SHOWN_TOKENS])) + (
            ", ..." if len(names) > NUM_SHOWN_TOKENS else ""
        )
        lines.append(
            f"warning: {len(names)} tokens that one tokenizer alone has ({shown}) are left out "
            "of both heads"
        )
    return lines


def num_named_rows(model: LanguageModel) -> int:
    """How many rows of a head have tokens; what is drawn from a model that is not being trained."""
    return min(model.vocab_size, max(model.tokenizer.get_vocab().values()) + 1)
