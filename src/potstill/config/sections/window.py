"""The fields of the window: how long completions are in training, and when that changes."""

from typing import Annotated, Literal

from pydantic import Field

from potstill.config.roles import Place, Role
from potstill.config.section import Section


class Window(Section, role=Role.WINDOW):
    tokens: Annotated[int, Place.FIRST] = Field(default=128, ge=1)
    """Completion length cap in training, the largest that a schedule reaches. Stops beyond it are
    not learnt."""
    schedule: Literal["fixed", "linear", "entropy-gated"] = "fixed"
    """fixed: always `tokens`; linear: from `start` to it; entropy-gated: up a ladder while probes
    of the student pass."""
    start: int = Field(default=128, ge=1)
    """linear, entropy-gated: the first window; at most `tokens`."""
    over_steps: int | None = Field(default=None, ge=1)
    """linear: steps until the window is `tokens`; all steps of the run by default."""
    ladder: tuple[int, ...] | None = None
    """entropy-gated: the windows after `start`, growing, the last one `tokens`; doubling by
    default."""
    check_every: int = Field(default=50, ge=1)
    """entropy-gated: steps between probes. The first is before the first step."""
    num_probes: int = Field(default=64, ge=1)
    """entropy-gated: prompts of the data that are held out and written to by the student at each
    probe."""
    patience: int = Field(default=2, ge=1)
    """entropy-gated: probes in a row that must pass before the window grows."""
    reference: Literal["first", "absolute", "teacher"] = "first"
    """entropy-gated: the threshold is a share of the first probe's entropy, a number of nats, or a
    share of the teacher's entropy on the same tokens."""
    threshold: float = Field(default=0.5, ge=0)
    """entropy-gated: a probe fails when the student's entropy, up to the first answer or stop, is
    below this."""
    max_truncation: float = Field(default=0.3, ge=0, le=1)
    """entropy-gated: a probe fails when more responses than this are cut, beyond the share that the
    teacher's are."""
    max_repetition: float = Field(default=0.02, ge=0, le=1)
    """entropy-gated: a probe fails when more responses than this are loops (zlib makes them ten
    times smaller)."""
    sticky: bool = True
    """entropy-gated: after a failed probe the window never grows again; else it can when probes
    pass again."""
    step_back: bool = False
    """entropy-gated: a failed probe takes the window one step down the ladder."""
