"""Check of a task's verifier: it accepts right answers and rejects those of other problems."""

from collections.abc import Sequence

from potstill.checks.finding import Finding, Subject
from potstill.prompts.examples import load_task
from potstill.tasks import Task, is_table
from potstill.types import Example

CHECK = "verifier"
GRAVEST = ("error", "warning", "ok", "skipped")
# Problems that are graded, at most, and how a response may give its answer: in the ways of the
# tasks here, of other tasks, and alone.
NUM_PROBLEMS = 16
FORMS = ("\\boxed{{{}}}", "#{}", "<answer>{}</answer>", "#### {}", "The answer is {}.", "{}")
RIGHT = 0.999
# Shares of other problems' answers: a few may be right as well, where a problem has several.
FEW_RIGHT, MANY_RIGHT = 0.05, 0.5


def verifier(subject: Subject) -> Finding:
    """Whether the task's verifier accepts its golds, and rejects each as the answer to another
    problem."""
    data, evaluation = subject.recipe.data, subject.recipe.evaluation
    num = data.num_prompts or NUM_PROBLEMS
    findings = []
    if not subject.is_given and not is_table(data.origin):
        findings.append(_graded("data.source", str(data.origin), data.split, num, data.seed))
    if evaluation.source is not None and not is_table(evaluation.source):
        given = (evaluation.source, evaluation.split, evaluation.num_problems, evaluation.seed)
        findings.append(_graded("evaluation.source", *given))
    if not findings:
        return Finding(check=CHECK, level="skipped", says="no source is a task, which has scores")
    return min(findings, key=lambda finding: GRAVEST.index(finding.level))


def _graded(name: str, source: str, split: str, num: int, seed: int) -> Finding:
    """The verifier's grades of one source's own answers, in the form that it likes best."""
    num = min(num, NUM_PROBLEMS)
    task, examples = load_task(source, split=split, num_examples=num, seed=seed)
    examples = [example for example in examples if example.answer]
    if not examples:
        says = f"{source}: its examples have no answers"
        return Finding(check=CHECK, level="skipped", says=says)
    own = [str(example.answer) for example in examples]
    accepted, form = max((_share(task, examples, own, form), form) for form in FORMS)
    measured = {"source": source, "accepted": accepted, "num_problems": len(examples)}
    if accepted < RIGHT:
        return Finding(
            check=CHECK,
            level="error" if accepted < MANY_RIGHT else "warning",
            says=f"{source} accepts {accepted:.0%} of its own answers, in the form {form!r}",
            fix=f"mend the answers or the grading of {name}: right responses score 0",
            measured=measured,
        )
    pairs = _other_answers(examples)
    asked, answers = [example for example, _ in pairs], [answer for _, answer in pairs]
    wrong = _share(task, asked, answers, form) if pairs else 0.0
    says = f"{source} accepts {accepted:.0%} of its own answers and {wrong:.0%} of others'"
    measured |= {"others_accepted": wrong}
    if wrong <= FEW_RIGHT:
        return Finding(check=CHECK, level="ok", says=says, measured=measured)
    level = "error" if wrong > MANY_RIGHT else "warning"
    fix = f"mend the grading of {name}: wrong responses score"
    return Finding(check=CHECK, level=level, says=says, fix=fix, measured=measured)


def _other_answers(examples: Sequence[Example]) -> list[tuple[Example, str]]:
    """Each example with the answer of the next one, where that is another."""
    shifted = [*examples[1:], *examples[:1]]
    return [
        (example, str(other.answer))
        for example, other in zip(examples, shifted, strict=True)
        if example.answer != other.answer
    ]


def _share(task: Task, examples: Sequence[Example], answers: Sequence[str], form: str) -> float:
    """The share of the answers that score fully."""
    grades = task.grade(list(examples), [form.format(answer) for answer in answers])
    return sum(grade.score >= RIGHT for grade in grades) / len(grades)
