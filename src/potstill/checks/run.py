"""Checks, one after another: a check that cannot be done is a finding too."""

from collections.abc import Callable
from typing import Any

import torch

from potstill.checks import resources, settings
from potstill.checks.finding import Finding, Subject
from potstill.console.boundary import describe_error
from potstill.types import NonFiniteError

# Those that take no noticeable time. A run begins with them.
AT_START: dict[str, Callable[[Subject], Finding]] = {
    "templates": settings.templates,
    "learning rate": settings.peak_learning_rate,
    "data and window": settings.data_window,
    "memory": resources.memory,
    "disk": resources.disk,
}


def guarded(name: str, check: Callable[..., Finding], *given: Any) -> Finding:
    """A check's finding; of one that raises, what it raised."""
    try:
        with torch.no_grad():
            return check(*given)
    except NonFiniteError as error:
        return no_number(name, error)
    # A check must not keep the others from being done.
    except Exception as error:
        reason = describe_error(error) or f"{type(error).__name__}: {error}"
        return Finding(check=name, level="failed", says=f"it cannot be checked: {reason}")


def no_number(name: str, error: NonFiniteError) -> Finding:
    """The finding of a check that came upon what is not finite."""
    fix = "look at both models' weights, and at student.dtype and teacher.dtype"
    return Finding(check=name, level="error", says=str(error), fix=fix)


def faults_at_start(subject: Subject) -> list[str]:
    """A line for each fault that can be seen before the first step."""
    findings = [guarded(name, check, subject) for name, check in AT_START.items()]
    return [
        f"warning: {finding.check}: {finding.says}; {finding.fix}"
        for finding in findings
        if finding.level in ("warning", "error")
    ]
