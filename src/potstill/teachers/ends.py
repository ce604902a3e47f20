"""End tokens: which ids end a completion, and which of them are one class in the loss.

Both are decided here alone. Training, caches and evaluation ask the same functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from potstill.config import Recipe, RecipeError
from potstill.models.language_model import LanguageModel
from potstill.teachers.protocol import Teacher
from potstill.types import ModelError

# Ends that hand over to a tool: the turn goes on when the tool has answered. In one class with the
# end of an answer a student would learn to do either where the teacher does one of them.
TOOL_ENDS = (
    "<|eom_id|>",  # Llama 3.1 and later
    "<|eom|>",  # Llama 4
    "<|call|>",  # gpt-oss
    "<|observation|>",  # GLM-4
    "<|tools_suffix|>",  # Apertus
    "<start_function_response>",  # FunctionGemma
    "<|tool_response>",  # Gemma 4
)


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The end tokens of a run, the student's first.

    `all_ids` are those of both models, `stop_ids` those that end a completion, `class_ids` those
    that count as one class in the loss, and `compared_ids` those whose probabilities are logged; of
    either two or more, or none.
    """

    all_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    class_ids: tuple[int, ...] = ()
    compared_ids: tuple[int, ...] = ()


def find_ends(
    recipe: Recipe, student: LanguageModel, teacher: Teacher | None, vocab_size: int | None
) -> Ends:
    """The end tokens of a distillation whose heads share `vocab_size` rows.

    An id without a row is never written and has no probability, so that it has no part in a class.
    A teacher with a tokenizer of its own has ends of its own, which are none of these.
    Raises ModelError when there is no end token, RecipeError when `objective.separate_ends` names
    something else.
    """
    objective = recipe.objective
    all_ids = end_set(student, None if objective.signal == "spans" else teacher)
    stop_ids = all_ids if recipe.rollouts.end_set == "union" else end_set(student)
    apart = separate_ids(student.tokenizer, all_ids, objective.separate_ends)
    with_row = tuple(i for i in all_ids if i < (vocab_size or student.vocab_size))
    members = tuple(i for i in with_row if i not in apart)
    has_class = objective.end_class == "merged" and objective.has_divergence and len(members) > 1
    return Ends(
        all_ids=all_ids,
        stop_ids=stop_ids,
        class_ids=members if has_class else (),
        compared_ids=with_row if len(with_row) > 1 else (),
    )


def answer_ends(model: LanguageModel | Teacher) -> tuple[int, ...]:
    """A model's own end ids, but for those that are known to mean something else than the end of an
    answer, and those without a row."""
    apart = separate_ids(model.tokenizer, model.end_ids, None)
    return tuple(i for i in model.end_ids if i not in apart and i < model.vocab_size)


def end_set(student: LanguageModel, teacher: Teacher | None = None) -> tuple[int, ...]:
    """The union of both models' end ids. Raises ModelError when there is none: nothing would ever
    stop."""
    ids = tuple(dict.fromkeys((*student.end_ids, *(teacher.end_ids if teacher else ()))))
    if not ids:
        raise ModelError(
            f"model {student.name!r} names no end token; set eos_token_id in its "
            "generation_config.json"
        )
    return ids


def separate_ids(tokenizer, end_ids: Sequence[int], names: Sequence[str] | None) -> tuple[int, ...]:
    """The end ids of these names, which are kept out of the class; None: of those that are known to
    mean another thing.

    Raises RecipeError for a name that is no end token's.
    """
    id_of = dict(zip(end_names(tokenizer, end_ids), end_ids, strict=True))
    if names is None:
        return tuple(i for name, i in id_of.items() if name in TOOL_ENDS)
    if other := next((name for name in names if name not in id_of), None):
        raise RecipeError(
            f"objective.separate_ends names {other!r}, which is no end token of student or "
            f"teacher; theirs are {', '.join(id_of)}: name some of these, or remove it"
        )
    return tuple(id_of[name] for name in names)


def named_end_ids(tokenizer, names: Sequence[str]) -> tuple[int, ...]:
    """The ids of end tokens given by name. Raises ModelError for a name that is not in the
    vocabulary."""
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name not in vocabulary:
            known = [
                str(token)
                for _, token in sorted(tokenizer.added_tokens_decoder.items())
                if token.special
            ]
            raise ModelError(
                f"end token {name!r} is not in the tokenizer's vocabulary; its special tokens "
                f"are {', '.join(known)}"
            )
    return tuple(dict.fromkeys(vocabulary[name] for name in names))


def end_names(tokenizer, ids: Sequence[int]) -> list[str]:
    """The tokenizer's names for these ids; the number of an id that it does not know."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [str(i) if name is None else name for name, i in zip(names, ids, strict=True)]


def describe_ends(tokenizer, ids: Sequence[int]) -> str:
    """End tokens by name and id, for a line that the user reads."""
    return ", ".join(
        f"{name} ({i})" for name, i in zip(end_names(tokenizer, ids), ids, strict=True)
    )
