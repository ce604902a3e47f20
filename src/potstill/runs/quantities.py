"""The quantities of a validation as they are shown: titles, units and digits."""

from typing import NamedTuple


class Shown(NamedTuple):
    """A quantity of a validation: its title, how it is called in a table, and in what it is shown.

    It is shown times `scale`.
    """

    title: str
    column: str
    scale: float = 1.0
    digits: int = 4


SHOWN = {
    "teacher_prefix_forward_kl": Shown("forward KL on the teacher's text (nats)", "teacher fwd"),
    "teacher_prefix_reverse_kl": Shown("reverse KL on the teacher's text (nats)", "teacher rev"),
    "student_prefix_forward_kl": Shown("forward KL on the student's text (nats)", "student fwd"),
    "student_prefix_reverse_kl": Shown("reverse KL on the student's text (nats)", "student rev"),
    "student_perplexity": Shown("student's perplexity of the teacher's text", "perplexity", 1, 3),
    "teacher_log_prob": Shown("teacher's log-probability of the student's text", "log-prob", 1, 3),
    "student_entropy_before_answer": Shown("student entropy up to the answer", "entropy", 1, 3),
    "length": Shown("length of the student's text (tokens)", "length", 1, 0),
    "truncation": Shown("share of the student's text that is cut (%)", "cut %", 100, 0),
    "repetition": Shown("share of the student's text that is a loop (%)", "loops %", 100, 0),
    "score": Shown("score of the student's text (%)", "score %", 100, 1),
    "judged": Shown("judge's score of the student's text", "judged", 1, 3),
}
