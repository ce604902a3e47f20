"""Models small enough that all their texts can be enumerated."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from potstill.kl.head import Head
from potstill.models.batch import Batch

V, WINDOW, END = 3, 3, 0
Text = tuple[int, ...]
# The error of central differences is of the order of STEP squared.
STEP = 1e-5


class Table(nn.Module):
    """A language model with a row of logits for every prefix; looks to `batch_loss` like any
    other."""

    def __init__(self, seed: int, spread: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        prefixes = [
            text for n in range(WINDOW) for text in itertools.product(range(1, V), repeat=n)
        ]
        self.row_of = {prefix: i for i, prefix in enumerate(prefixes)}
        logits = spread * torch.randn(len(prefixes), V, generator=generator, dtype=torch.float64)
        self.logits_SV = nn.Parameter(logits)
        self.head = Head(torch.eye(V, dtype=torch.float64))

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """The logits themselves as hidden states, under a head that is the identity. The prompt is
        one token."""
        rows = [
            # Padding follows the end of a text, and no loss looks at it.
            [self.row_of.get(tuple(ids[1 : t + 1]), 0) for t in range(len(ids))]
            for ids in input_ids_BT.tolist()
        ]
        return self.logits_SV[torch.tensor(rows)]

    def signal_at(self, batch: Batch) -> Tensor:
        """As a teacher: the rows of a batch's loss tokens."""
        return self(batch.teacher_ids_BT)[batch.teacher_mask_BT]

    def log_probs(self, prefix: Text) -> Tensor:
        """Log-probabilities of the next token, [V]."""
        return self.logits_SV[self.row_of[prefix]].log_softmax(-1)

    def log_prob(self, text: Text) -> Tensor:
        """The log-probability of a whole text."""
        return torch.stack([self.log_probs(text[:t])[token] for t, token in enumerate(text)]).sum()


def all_texts(window: int = WINDOW) -> list[Text]:
    """Every text that a model can write within a window."""
    found = []
    for n in range(1, window + 1):
        for body in itertools.product(range(1, V), repeat=n - 1):
            found += [(*body, token) for token in range(V) if token == END or n == window]
    return found


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) by its definition."""
    return (log_p.exp() * (log_p - log_q)).sum()


def by_prefix(kind: str, student: Table, teacher: Table, prefix: Text) -> Tensor:
    """The forward or reverse KL after a prefix."""
    log_q, log_p = student.log_probs(prefix), teacher.log_probs(prefix)
    return kl(log_p, log_q) if kind == "forward" else kl(log_q, log_p)


def expectation(
    writer: Table, cost: Callable[[Text], Tensor], frozen: bool = True, window: int = WINDOW
) -> Tensor:
    """The mean over a writer's texts of the sum of a cost over their prefixes; `frozen` keeps the
    texts constant."""
    total = torch.zeros((), dtype=torch.float64)
    for text in all_texts(window):
        probability = writer.log_prob(text).exp()
        costs = torch.stack([cost(text[:t]) for t in range(len(text))]).sum()
        total = total + (probability.detach() if frozen else probability) * costs
    return total


def sequence_kl(kind: str, student: Table, teacher: Table, window: int = WINDOW) -> Tensor:
    """The KL between the two distributions over texts of at most `window` tokens."""
    pairs = [(teacher.log_prob(text), student.log_prob(text)) for text in all_texts(window)]
    log_p, log_q = (torch.stack(column) for column in zip(*pairs, strict=True))
    return kl(log_p, log_q) if kind == "forward" else kl(log_q, log_p)


def score_sum(student: Table, writer: Table, factor: Callable[[Text, int], float]) -> Tensor:
    """The gradient [S, V] of E_y sum_t factor(y, t) log q(y_t) with everything but log q
    constant."""
    total = torch.zeros((), dtype=torch.float64)
    for text in all_texts():
        probability = writer.log_prob(text).exp().item()
        for t, token in enumerate(text):
            total = total + probability * factor(text, t) * student.log_probs(text[:t])[token]
    (gradient,) = torch.autograd.grad(total, student.logits_SV)
    return gradient


def differences(student: Table, function: Callable[[], Tensor]) -> Tensor:
    """The gradient [S, V] of a function of the student's logits, by central differences."""
    gradient = torch.zeros_like(student.logits_SV)
    with torch.no_grad():
        for index in itertools.product(*map(range, student.logits_SV.shape)):
            kept = student.logits_SV[index].item()
            student.logits_SV[index] = kept + STEP
            above = function()
            student.logits_SV[index] = kept - STEP
            gradient[index] = (above - function()) / (2 * STEP)
            student.logits_SV[index] = kept
    return gradient


def apart(a: Tensor | float, b: Tensor | float) -> float:
    """The largest difference of two numbers or tensors."""
    a, b = (torch.as_tensor(each, dtype=torch.float64).detach() for each in (a, b))
    return float((a - b).abs().max())


def relative(a: Tensor, b: Tensor) -> float:
    return apart(a, b) / float(b.abs().max().clamp(min=1e-30))
