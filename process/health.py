"""What a check finds, and how often a remedy may be tried: the same words on a device and in the cloud.

Laws of the file: pure; a verdict follows from facts that somebody else gathered; a remedy that does not help is tried
less and less often, so that no remedy becomes the trouble. Source: docs/architecture.md, "Health".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

Level = Literal["ok", "warn", "fail"]
Mode = Literal["on", "dry_run", "off"]
"""What is done about a finding: the remedy, a line that says what would be done, or nothing."""

LONGEST_REST_SECONDS: Final = 86_400.0
DISK: Final = "disk"
_NAME_WIDTH: Final = 12
_FULL_SHARE: Final = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        hint: what to do, where there is something to do.
        remedy: what the program does about it by itself, or empty.
    """

    name: str
    level: Level
    detail: str
    hint: str = ""
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For a person."""
        shown = [f"{self.level:<5} {self.name:<{_NAME_WIDTH}} {self.detail}"]
        if self.level != "ok":
            indent = " " * (_NAME_WIDTH + 6)
            shown += [f"{indent} hint: {self.hint}"] if self.hint else []
            shown += [f"{indent} remedy: {self.remedy}"] if self.remedy else []
        return shown


@dataclass(frozen=True, slots=True)
class Prescription:
    """What a remedy wants to be done.

    Attributes:
        check: the check whose finding it answers.
        reason: one line, for the log and the books.
    """

    remedy: str
    check: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Given:
    """When a remedy was given last (monotonic seconds), and how often in a row."""

    remedy: str
    at: float
    times: int


@dataclass(frozen=True, slots=True)
class Ration:
    """How often each remedy was given; decides whether it may be given again."""

    given: tuple[_Given, ...] = ()

    def allow(
        self, wanted: Sequence[Prescription], now: float, rest_seconds: float
    ) -> tuple[tuple[Prescription, ...], Ration]:
        """Which of the prescriptions may be carried out now, and the ration after that.

        Between two of a kind are `rest_seconds`, twice that after the second in a row, and so on up to a day. What is
        not wanted any more has helped, and begins anew.

        Args:
            now: monotonic seconds.
        """
        known = {each.remedy: each for each in self.given}
        names = {prescription.remedy for prescription in wanted}
        for name, each in known.items():
            if name not in names:
                known[name] = replace(each, times=0)
        allowed = []
        for prescription in wanted:
            before = known.get(prescription.remedy)
            if before is not None and now < before.at + _rest(rest_seconds, before.times):
                continue
            times = before.times + 1 if before is not None else 1
            known[prescription.remedy] = _Given(prescription.remedy, now, times)
            allowed.append(prescription)
        return tuple(allowed), Ration(tuple(known.values()))


def _rest(rest_seconds: float, times: int) -> float:
    return min(rest_seconds * 2.0 ** min(max(times - 1, 0), 32), max(rest_seconds, LONGEST_REST_SECONDS))


def judge_room(
    free_bytes: int | None, min_free_bytes: int, trouble: str, *, hint: str, trouble_hint: str
) -> Finding:
    """Of a disk: fails when nothing can be written (`trouble`), or an eighth of what should be free is left.

    Args:
        free_bytes: None where nobody knows.
    """
    if trouble:
        return Finding(DISK, "fail", trouble, trouble_hint)
    if free_bytes is None:
        return Finding(DISK, "ok", "not known")
    detail = f"{free_bytes // 2**20} MiB free"
    if free_bytes < min_free_bytes // _FULL_SHARE:
        return Finding(DISK, "fail", detail, hint)
    return Finding(DISK, "warn" if free_bytes < min_free_bytes else "ok", detail, hint)


def with_remedies(findings: Iterable[Finding], wanted: Sequence[Prescription]) -> list[Finding]:
    """The findings, each with what would be done about it."""
    by_check = {prescription.check: prescription.remedy for prescription in wanted}
    return [replace(finding, remedy=by_check.get(finding.name, "")) for finding in findings]


def exit_code(findings: Iterable[Finding]) -> int:
    """Of a command that prints findings: 1 when one of them is a failure, else 0."""
    return int(any(finding.level == "fail" for finding in findings))
