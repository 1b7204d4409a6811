"""What a program's looks at its own health found, told in its log: every change once, every remedy of a dry run once.

Source: docs/architecture.md, "Health".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from process.health import Finding, Level, Mode, Prescription
from process.logs import EventLogger

_NUMBERS: Final[dict[Level, float]] = {"ok": 0.0, "warn": 1.0, "fail": 2.0}


class Bulletin:
    """Of one program.

    Attributes:
        findings: of the newest look.
    """

    def __init__(self, log: EventLogger) -> None:
        self._log = log
        self._would: frozenset[str] = frozenset()
        self.findings: tuple[Finding, ...] = ()

    def tell(self, findings: tuple[Finding, ...]) -> None:
        """A line in the log for every finding that changed."""
        before = {finding.name: finding.level for finding in self.findings}
        self.findings = findings
        for finding in findings:
            if finding.level == before.get(finding.name, "ok"):
                continue
            say = self._log.info if finding.level == "ok" else self._log.warning
            say("health", check=finding.name, found=finding.level, detail=finding.detail, hint=finding.hint)

    def tell_what_would_be(self, wanted: Sequence[Prescription], mode: Mode) -> None:
        """A line for every remedy that is new among those that a dry run does not carry out."""
        if mode == "dry_run":
            for each in wanted:
                if each.remedy not in self._would:
                    self._log.info(
                        "remedy_would_be", remedy=each.remedy, check=each.check, reason=each.reason
                    )
        self._would = frozenset(each.remedy for each in wanted)

    def levels(self) -> dict[str, float]:
        """By check: 0 ok, 1 warn, 2 fail."""
        return {finding.name: _NUMBERS[finding.level] for finding in self.findings}
