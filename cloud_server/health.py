"""The aggregator's health: facts are gathered, checks judge, remedies are written into the books and carried out.

Laws of the file: the running service looks on its loop's thread, so a look must be cheap; a remedy stands in the audit
chain before it is carried out (or, where the database is what is wrong, as soon as it answers again); what fails is a
line in the log. Rules stand in `checks/` and `remedies/`. Source: docs/architecture.md, "Health".
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from cloud_server.checks import judge_all
from cloud_server.checks.facts import Facts
from cloud_server.clock_evidence import judge_clock
from cloud_server.db.audit import append_audit, newest_entry
from cloud_server.db.overview import count_stored, list_runs
from cloud_server.db.releases import load_models, load_rollouts
from cloud_server.deployment import Deployment
from cloud_server.enrolment.ca import SERVER_DAYS, certificate_ends
from cloud_server.release.expiry import judge_expiries
from cloud_server.remedies import RATIONED, pause_training, prescribe
from process.bulletin import Bulletin
from process.health import Finding, Prescription, Ration
from process.logs import get_logger
from wire.errors import ShoalError, StorageError

_log = get_logger("cloud.health")

_DAY: Final = 86_400.0
_RENEWED_SECONDS: Final = SERVER_DAYS / 10 * _DAY
"""With so much of it left `ensure_server_files` makes a certificate anew."""
_AUTHORITY: Final = "ca"
_UNWRITTEN: Final = 64
_RATIONED: Final = frozenset(remedy.NAME for remedy in RATIONED)

Signatures = Callable[[], Mapping[str, float]]
"""When each TUF role's signature ends, unix seconds; may be of some time ago."""


def gather(deployment: Deployment, signatures: Signatures | None = None) -> Facts:
    """What can be known from the state folder and the database; the service need not run."""
    now = deployment.clock.now()
    facts = _of_disk(deployment.folder.root)
    try:
        facts = replace(facts, **_of_certificates(deployment, now))
    except ShoalError as error:
        facts = replace(facts, certificate_trouble=str(error))
    try:
        facts = replace(facts, **_of_database(deployment, now))
    except StorageError as error:
        return replace(facts, database_trouble=str(error))
    try:
        ends = (signatures or deployment.repository.expiries)()
        evidence = deployment.clock_evidence(with_database=True)
        trouble = judge_clock(evidence, deployment.settings.clock.limits())
    except ShoalError as error:
        return replace(facts, certificate_trouble=str(error))
    judged = judge_expiries(ends, deployment.repository.expiry, now)
    return replace(
        facts,
        clock_trouble=trouble,
        signatures={each.role: each.left_seconds for each in judged},
        signatures_due=tuple(each.role for each in judged if each.is_due),
    )


def _of_disk(folder: Path) -> Facts:
    if not os.access(folder, os.W_OK):
        return Facts(disk_trouble=f"{folder} cannot be written")
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return Facts(disk_trouble=f"{folder}: {error.strerror}")
    return Facts(free_bytes=disk.f_bavail * disk.f_frsize)


def _of_certificates(deployment: Deployment, now: float) -> dict[str, Any]:
    left = {name: end - now for name, end in certificate_ends(deployment.folder.authority).items()}
    renewable = {
        name
        for name, seconds in left.items()
        if seconds < _RENEWED_SECONDS and not (name == _AUTHORITY or name.startswith(f"{_AUTHORITY}-"))
    }
    return {"certificates": left, "renewable": frozenset(renewable)}


def _of_database(deployment: Deployment, now: float) -> dict[str, Any]:
    ring = deployment.settings.enrolment.ring
    with deployment.database.read() as connection:
        newest, runs = newest_entry(connection), list_runs(connection)
        released = [row.release_version for row in load_rollouts(connection) if row.ring == ring]
        stored, models = count_stored(connection), len(load_models(connection))
    fence = deployment.fence
    return {
        "behind_seconds": 0.0 if newest is None else max(0.0, newest.at - now),
        "is_fenced_off": fence is not None and deployment.database.current_fence() != fence,
        "models": models,
        "run": runs[-1]["run"] if runs else "",
        "run_status": runs[-1]["status"] if runs else "",
        "release_version": max(released, default=0),
        "stored": stored,
    }


class CloudHealth:
    """Looks after one running service; `tick` on its loop's thread.

    Args:
        live: adds what only the running service knows.
        remedies: what carries out each remedy, by its name; each gets the reason. `pause_training` gets an empty one
            when rounds may be opened again.
        signatures: see `gather`.

    Attributes:
        remedies_total: remedies that were carried out, by name.
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        live: Callable[[Facts], Facts],
        remedies: Mapping[str, Callable[[str], object]],
        signatures: Signatures | None = None,
    ) -> None:
        self._deployment = deployment
        self._live = live
        self._remedies = remedies
        self._signatures = signatures
        self._limits = deployment.settings.health
        self._clock = deployment.clock
        self._ration = Ration()
        self._next_look = 0.0
        self._held_at: float | None = None
        self._bulletin = Bulletin(_log)
        self._unwritten: deque[tuple[float, dict[str, str]]] = deque(maxlen=_UNWRITTEN)
        self.remedies_total: Counter[str] = Counter()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of the newest look."""
        return self._bulletin.findings

    @property
    def is_database_well(self) -> bool:
        """Whether the database answered at the newest look; so it is before the first."""
        return all(each.level != "fail" for each in self.findings if each.name == "database")

    def levels(self) -> dict[str, float]:
        """By check: 0 ok, 1 warn, 2 fail."""
        return self._bulletin.levels()

    def tick(self) -> None:
        """Looks when it is time to."""
        now = self._clock.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + self._limits.check_seconds
        try:
            self.look()
        except ShoalError as error:
            _log.error("health_not_known", error=str(error), hint=error.hint)

    def look(self) -> None:
        """One look, and what follows from it.

        Raises:
            ShoalError: what is needed to judge cannot be read.
        """
        facts = self._live(gather(self._deployment, self._signatures))
        if self._held_at is not None:
            held_seconds = self._clock.monotonic() - self._held_at
            facts = replace(facts, is_held=True, held_seconds=held_seconds)
        self._bulletin.tell(judge_all(facts, self._limits))
        wanted = prescribe(facts, self._limits)
        if self._limits.remedies != "on":
            self._bulletin.tell_what_would_be(wanted, self._limits.remedies)
            return
        if not any(each.remedy == pause_training.NAME for each in wanted):
            self._end_hold()
        for prescription in self._allowed(wanted):
            self._carry_out(prescription)
        self._write_books()

    def _allowed(self, wanted: tuple[Prescription, ...]) -> list[Prescription]:
        rationed = [each for each in wanted if each.remedy in _RATIONED]
        allowed, self._ration = self._ration.allow(
            rationed, self._clock.monotonic(), self._limits.remedy_seconds
        )
        begins = [each for each in wanted if each.remedy not in _RATIONED and self._held_at is None]
        return [*begins, *allowed]

    def _carry_out(self, prescription: Prescription) -> None:
        name, reason = prescription.remedy, prescription.reason
        self.remedies_total[name] += 1
        if name == pause_training.NAME:
            self._held_at = self._clock.monotonic()
        self._note(name, prescription.check, reason)
        try:
            self._remedies[name](reason)
        except (ShoalError, OSError) as error:
            _log.error("remedy_failed", remedy=name, error=str(error))

    def _end_hold(self) -> None:
        if self._held_at is not None:
            self._held_at = None
            self._note("resume_training", "disk", "the disk has room again")
            self._remedies[pause_training.NAME]("")

    def _note(self, remedy: str, check: str, reason: str) -> None:
        _log.warning("remedy", remedy=remedy, check=check, reason=reason)
        self._unwritten.append((self._clock.now(), {"remedy": remedy, "check": check, "reason": reason}))
        self._write_books()

    def _write_books(self) -> None:
        """Appends what is not in the audit chain yet; a database that refuses is asked again at the next look."""
        try:
            while self._unwritten:
                at, body = self._unwritten[0]
                with self._deployment.database.transaction(fence=self._deployment.fence) as connection:
                    append_audit(connection, "health.remedy", at, body)
                self._unwritten.popleft()
        except StorageError as error:
            _log.error("remedy_not_in_the_books", error=str(error), hint=error.hint)
