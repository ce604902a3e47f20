"""The rows of two heads that one loss is over, and one draw: ids that both tokenizers agree on."""

from collections.abc import Callable, Iterable, Sequence

from potstill.config import Recipe
from potstill.models.language_model import LanguageModel
from potstill.prompts.prepare import texts_of
from potstill.teachers.protocol import Teacher
from potstill.types import DataError, ModelError, Prompt

# So many tokens are shown of a list.
NUM_SHOWN_TOKENS = 3
# So many characters are shown at most of a text that two tokenizers cut in other places.
MOST_SHOWN = 60


def vocabulary_of_run(
    recipe: Recipe, student: LanguageModel, teacher: Teacher | None, given=None
) -> int | None:
    """How many rows the two heads of a run share, None without a teacher; errors as of
    `shared_vocab_size`. `given` takes the place of `data.source`."""
    if teacher is None:
        return None
    return shared_vocab_size(student, teacher, lambda: texts_of(recipe, given))


def shared_vocab_size(
    student: LanguageModel,
    teacher: Teacher,
    texts: Callable[[], Sequence[str]] = lambda: (),
) -> int:
    """How many rows the two heads share, which is what the loss is over and what is drawn from.

    Rows beyond the tokenizers' ids are padding, and the larger head is cut. Tokens that were added
    to one tokenizer alone, after all that they have in common, are cut off as well;
    `unshared_tokens` names them. Raises ModelError for a model all of whose ends are cut off, and
    where the tokenizers differ otherwise; it then says by how much, in their tokens and in `texts`.
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
            f"{len(differing):,} ids (student / teacher: {shown}): "
            f"{describe_difference(student.tokenizer, teacher.tokenizer, texts())}; a token-level "
            'KL needs one vocabulary: set objective.signal = "spans" with prefix = "student", '
            "choose models of one family, or let this teacher write texts and train on them with "
            'objective.prefix = "dataset" and signal = "labels"'
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


def shared_by_all(
    recipe: Recipe, student: LanguageModel, teachers: Sequence[Teacher | None], given
) -> int | None:
    """The rows that the student's head shares with those of all teachers; arguments and errors are
    those of `vocabulary_of_run`. With `signal = "spans"` those of the student's tokens."""
    if recipe.objective.signal == "spans" and recipe.objective.has_divergence:
        return num_named_rows(student)
    sizes = [vocabulary_of_run(recipe, student, each, given) for each in teachers]
    return min((size for size in sizes if size is not None), default=None)


def describe_difference(mine, theirs, texts: Sequence[str]) -> str:
    """How far a teacher's tokenizer is from a student's: the share of tokens that both have, the
    share of characters that both cut into the same tokens, and the first place where they do
    not."""
    words, others = set(mine.get_vocab()), set(theirs.get_vocab())
    common = len(words & others)
    parts = [
        f"{common:,} of the student's {len(words):,} tokens ({common / len(words):.0%}) are among "
        f"the teacher's {len(others):,}"
    ]
    if not texts or not (mine.is_fast and theirs.is_fast):
        return parts[0]
    num_alike = num_all = 0
    first = None
    for text in texts:
        spans = [_spans(tokenizer, text) for tokenizer in (mine, theirs)]
        num_alike += sum(end - start for start, end in set(spans[0]) & set(spans[1]))
        num_all += sum(end - start for start, end in set(spans[0]))
        first = first or _first_difference(text, *spans)
    parts.append(f"{num_alike / max(num_all, 1):.0%} of this run's texts are cut alike")
    return ", ".join(parts) + (f" ({first})" if first else "")


def _spans(tokenizer, text: str) -> list[tuple[int, int]]:
    """The characters of a text that each of its tokens covers."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [(start, end) for start, end in encoded["offset_mapping"] if start < end]


def _first_difference(
    text: str, mine: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]]
) -> str | None:
    """The first stretch between two places where both cut a text that they do not cut alike in
    between."""
    start = 0
    for end in sorted({end for _, end in mine} & {end for _, end in theirs}):
        cuts = [
            "|".join(text[a:b] for a, b in spans if start <= a and b <= end)
            for spans in (mine, theirs)
        ]
        if cuts[0] != cuts[1] and len(text[start:end]) <= MOST_SHOWN:
            return f"{cuts[0]!r} to the student is {cuts[1]!r} to the teacher"
        start = end
    return None


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
    if teacher.can_score and teacher.head is None and teacher.vocab_size > size:
        lines.append(
            f"the teacher's server tells log-probabilities among all its {teacher.vocab_size} rows:"
            " they are lower by what it gives to those that are cut, which no expected gradient of "
            "the reverse KL depends on"
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


def num_named_rows(model: LanguageModel | Teacher) -> int:
    """How many rows of a head have tokens; what is drawn from a model that shares them with no
    other."""
    return min(model.vocab_size, max(model.tokenizer.get_vocab().values()) + 1)
