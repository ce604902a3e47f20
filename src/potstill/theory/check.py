"""The check of one identity: how far its two sides are apart, and how far they may be."""

from dataclasses import dataclass

BOUND = 1e-8
# Values that are said to differ must do so by more than rounding could.
DISTANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Check:
    """One identity: how far its two sides are apart, and whether that is as it should be.

    `differs` marks the statements that two things are not the same: their distance must be at least
    `bound`.
    """

    name: str
    error: float
    bound: float = BOUND
    differs: bool = False

    @property
    def holds(self) -> bool:
        return self.error >= self.bound if self.differs else self.error <= self.bound
