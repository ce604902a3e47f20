"""Checks of a recipe's settings against the models and prompts: nothing is written or computed."""

from potstill.checks.finding import Finding, Subject
from potstill.models.templates import ChatTemplate, TemplateError
from potstill.models.weights import FEW_MOVE, share_that_moves
from potstill.prompts.chat import make_chat
from potstill.teachers.ends import describe_ends
from potstill.types import Prompt

# A rate this many times the usual one wrecks pretrained weights. Below so many weights models are
# toys, which need far more than the usual.
LR_TIMES, FEW_WEIGHTS = 100, 10_000_000
# Share of a data set's completions that the window may cut before it is a warning.
MANY_CUT_COMPLETIONS = 0.5
# So many characters of a text are shown where two differ, and some of those before.
DIFFERENCE_CHARACTERS, BEFORE = 40, 12


def ends(subject: Subject) -> Finding:
    """Whether both models declare the same end tokens."""
    student, teacher = subject.student, subject.teacher
    sets = {"student": list(student.end_ids)}
    if teacher is not None:
        sets["teacher"] = list(teacher.end_ids)
    shown = describe_ends(student.tokenizer, subject.ends.stop_ids)
    translation = subject.loss.translation
    if translation is not None:
        theirs = describe_ends(translation.teacher.tokenizer, translation.teacher.end_ids)
        says = f"the student's completions end on {shown}, and the teacher's own end is {theirs}"
        return Finding(check="ends", level="ok", says=says, measured=sets)
    if teacher is None or set(student.end_ids) == set(teacher.end_ids):
        says = f"completions end on {shown}"
        return Finding(check="ends", level="ok", says=says, measured=sets)
    is_merged = bool(subject.ends.class_ids)
    fix = (
        "nothing: the loss counts them as one class"
        if is_merged
        else 'set objective.end_class = "merged", so that the loss counts them as one'
    )
    says = (
        f"the student ends on {describe_ends(student.tokenizer, student.end_ids)}, "
        f"the teacher on {describe_ends(student.tokenizer, teacher.end_ids)}"
    )
    return Finding(check="ends", level="warning", says=says, fix=fix, measured=sets)


def templates(subject: Subject) -> Finding:
    """Whether the teacher's chat template writes what the student's does, which the teacher
    reads."""
    check, teacher = "templates", subject.teacher
    rendered = next((p for p in subject.prompts if _is_rendered(subject, p)), None)
    if teacher is None or rendered is None:
        reason = "there is no teacher" if teacher is None else "prompts are taken as they are"
        return Finding(check=check, level="skipped", says=reason)
    if rendered.teacher_ids is not None:
        return Finding(check=check, level="ok", says="each model reads prompts of its own")
    if not teacher.tokenizer.chat_template:
        says = "the teacher has no chat template and reads prompts in the student's"
        fix = "choose a teacher that was trained on conversations of this kind"
        return Finding(check=check, level="warning", says=says, fix=fix)
    mine, theirs = (_rendered(subject, rendered, m.tokenizer) for m in (subject.student, teacher))
    if mine == theirs:
        return Finding(check=check, level="ok", says="both models' templates write the same prompt")
    place = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
        min(len(mine), len(theirs)),
    )
    start = max(place - BEFORE, 0)
    end = place + DIFFERENCE_CHARACTERS
    says = f"the teacher reads {mine[start:end]!r}, where its own template writes "
    says += repr(theirs[start:end])
    fix = 'set teacher.template = "chat", or choose models of one family'
    return Finding(check=check, level="warning", says=says, fix=fix, measured={"differ_at": place})


def _is_rendered(subject: Subject, prompt: Prompt) -> bool:
    return subject.recipe.data.template == "chat" or not isinstance(prompt.example.prompt, str)


def _rendered(subject: Subject, prompt: Prompt, tokenizer) -> str:
    template = ChatTemplate(tokenizer, subject.recipe.data.template_arguments, subject.date)
    try:
        return template.render([make_chat(prompt.example).prompt()])[0]
    except TemplateError as error:
        return f"nothing: it {error}"


def peak_learning_rate(subject: Subject) -> Finding:
    """Whether the peak learning rate is one that pretrained weights survive."""
    check, num = "learning rate", subject.student.num_weights
    times = subject.lr / subject.usual_lr
    measured = {"lr": subject.lr, "usual": subject.usual_lr, "num_weights": num}
    is_pretrained = subject.recipe.student.init == "pretrained"
    if times > LR_TIMES and num >= FEW_WEIGHTS and is_pretrained:
        says = (
            f"{subject.lr:.2g} is {times:,.0f} times what is usual for a student of {num:,} "
            "weights, and is likely to wreck it"
        )
        fix = f"set train.lr = {subject.usual_lr:.2g}, or remove it"
        return Finding(check=check, level="warning", says=says, fix=fix, measured=measured)
    says = f"{subject.lr:.2g} for {num:,} weights"
    return Finding(check=check, level="ok", says=says, measured=measured)


def updates(subject: Subject) -> Finding:
    """Whether an update of this size can change the weights in the type that they have."""
    learning = [w for w in subject.student.model.parameters() if w.requires_grad]
    share = share_that_moves(learning, subject.lr)
    dtype = str(learning[0].dtype).removeprefix("torch.")
    says = f"a step of {subject.lr:.2g} can change {share:.1%} of the weights, in {dtype}"
    measured = {"share_that_moves": share, "lr": subject.lr, "dtype": dtype}
    if subject.recipe.train.stochastic_rounding:
        says = f"{says}, and the rest by chance, as they are rounded"
    if share >= FEW_MOVE or subject.recipe.train.stochastic_rounding:
        return Finding(check="updates", level="ok", says=says, measured=measured)
    fix = 'set student.dtype = "float32" and train.compute_dtype = "bfloat16"'
    return Finding(
        check="updates",
        level="warning" if share else "error",
        says=f"{says}; the rest is rounded away",
        fix=fix,
        measured=measured,
    )


def data_window(subject: Subject) -> Finding:
    """How many completions of the data the window cuts, and so leaves without an end."""
    check, window = "data and window", subject.recipe.window.tokens
    lengths = [len(p.completion_ids) for p in subject.prompts if p.completion_ids is not None]
    if subject.recipe.objective.prefix != "dataset" or not lengths:
        return Finding(check=check, level="skipped", says="no completions are taken from the data")
    share = sum(length > window for length in lengths) / len(lengths)
    says = f"{share:.0%} of {len(lengths):,} completions are longer than {window} tokens"
    measured = {"share_cut": share, "window": window, "longest": max(lengths)}
    if share <= MANY_CUT_COMPLETIONS:
        return Finding(check=check, level="ok", says=says, measured=measured)
    fix = f"raise window.tokens (the longest has {max(lengths)}): a cut text teaches no end"
    return Finding(check=check, level="warning", says=says, fix=fix, measured=measured)
