"""What ends a history: something that must never be, and was seen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must never be: virtual seconds, who, what."""

    at: float
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.at:.3f} s, {self.who}: {self.what}"


class ViolationError(BaseException):
    """Ends a history; no handler of the product's may go on after it."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(str(violation))
        self.violation = violation
