"""The device's health, looked at by its own agent: facts are gathered, checks judge, remedies are carried out and told.

Laws of the file: it runs on the loop's thread and only reads there; a remedy is in the log and in a counter before it
is carried out, and with the next heartbeat the aggregator knows of it; what fails is a line in the log, and answers go
on. Rules stand in `checks/` and `remedies/`. Source: docs/architecture.md, "Health".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, cast

from edge_agent import events as on
from edge_agent.checks import judge_all
from edge_agent.checks.facts import Facts
from edge_agent.device_state import State
from edge_agent.parts import Parts
from edge_agent.remedies import RATIONED, pause_training, prescribe, reconnect, renew, roll_back, trim
from edge_agent.vitals.machine import Machine
from process.bulletin import Bulletin
from process.health import Finding, Prescription, Ration
from process.logs import get_logger
from wire.errors import ShoalError
from wire.messages import CheckName, RemedyName

_log = get_logger("edge_agent.vitals.health")

_RATIONED: Final = frozenset(remedy.NAME for remedy in RATIONED)


class Health:
    """Looks after one agent.

    Args:
        post: queues an event for the state machine, whose state `state` gives.

    Attributes:
        remedies_total: remedies that were carried out, by name.
    """

    def __init__(
        self,
        parts: Parts,
        machine: Machine,
        post: Callable[[on.Event], None],
        state: Callable[[], State],
    ) -> None:
        self._parts = parts
        self._state = state
        self._machine = machine
        self._post = post
        self._limits = parts.settings.health
        self._ration = Ration()
        self._paused_at = 0.0
        self._counted = (0, 0, 0)
        self._bulletin = Bulletin(_log)
        self.remedies_total: Counter[RemedyName] = Counter()
        self._remedies: dict[str, Callable[[str], None]] = {
            trim.NAME: self._trim,
            renew.NAME: lambda reason: self._post(on.CheckWanted()),
            reconnect.NAME: self._machine.rejoin,
            roll_back.NAME: self._roll_back,
            pause_training.NAME: self._pause,
        }

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of the newest look."""
        return self._bulletin.findings

    def look(self) -> None:
        """One look, and what follows from it."""
        try:
            facts = replace(self.facts(), watched=self._watch())
        except ShoalError as error:
            _log.warning("health_not_known", reason=str(error))
            return
        self._bulletin.tell(judge_all(facts, self._limits))
        wanted = prescribe(facts, self._limits)
        if self._limits.remedies != "on":
            self._resume()
            self._bulletin.tell_what_would_be(wanted, self._limits.remedies)
            return
        if not any(each.remedy == pause_training.NAME for each in wanted):
            self._resume()
        for prescription in self._allowed(wanted, facts):
            self._carry_out(prescription)

    def facts(self) -> Facts:
        """What is known now.

        Raises:
            StorageError: the database cannot be read.
        """
        parts, machine, state = self._parts, self._machine, self._state()
        now = parts.clock.monotonic()
        requests, errors = self._since_last()
        model = parts.serving.current
        validity = machine.certificate()
        return Facts(
            free_bytes=machine.free_bytes(),
            behind_seconds=parts.clock.behind_seconds,
            is_connected=state.connected,
            away_seconds=parts.tally.away_seconds(now),
            fruitless_sends=max((upload.sends for upload in state.uploads), default=0),
            release_version=model.release_version if model is not None else 0,
            requests=requests,
            errors=errors,
            is_on_probation=parts.slots.on_probation,
            celsius=machine.celsius(),
            owed=len(state.uploads),
            owed_bytes=parts.outbox.open_bytes(),
            owed_limit_bytes=parts.settings.storage.outbox_bytes,
            identity_trouble=parts.identity_trouble,
            certificate_seconds=None if validity is None else validity[1] - parts.clock.now(),
            certificate_life_seconds=0.0 if validity is None else validity[1] - validity[0],
            is_training_paused=bool(parts.training_paused),
            paused_seconds=now - self._paused_at if parts.training_paused else 0.0,
        )

    def _watch(self) -> str:
        watch = self._parts.serving.watch
        return watch.look(self._parts.settings.release) if watch is not None else ""

    def _since_last(self) -> tuple[int, int]:
        """Requests and errors of the model that serves, since the look before."""
        serving = self._parts.serving
        version = serving.current.release_version if serving.current is not None else 0
        counts = serving.by_release.get(version)
        seen = (version, counts.requests, counts.errors) if counts is not None else (version, 0, 0)
        before, self._counted = self._counted, seen
        if before[0] != version:
            before = (version, 0, 0)
        return seen[1] - before[1], seen[2] - before[2]

    # --- telling ------------------------------------------------------------------------------------------

    def unwell(self) -> tuple[CheckName, ...]:
        """Names of the checks whose newest finding is a failure."""
        return tuple(cast(CheckName, each.name) for each in self.findings if each.level == "fail")

    def levels(self) -> dict[str, float]:
        """By check: 0 ok, 1 warn, 2 fail."""
        return self._bulletin.levels()

    def as_dict(self) -> dict[str, Any]:
        """For the status file."""
        return {
            "findings": {each.name: each.level for each in self.findings},
            "remedies": dict(self.remedies_total),
            "training_paused": self._parts.training_paused,
        }

    # --- remedies -----------------------------------------------------------------------------------------

    def _allowed(self, wanted: tuple[Prescription, ...], facts: Facts) -> list[Prescription]:
        rationed = [each for each in wanted if each.remedy in _RATIONED]
        now = self._parts.clock.monotonic()
        allowed, self._ration = self._ration.allow(rationed, now, self._limits.remedy_seconds)
        begun = frozenset((pause_training.NAME,)) if facts.is_training_paused else frozenset()
        return [each for each in wanted if each.remedy not in _RATIONED | begun] + list(allowed)

    def _carry_out(self, prescription: Prescription) -> None:
        name, reason = prescription.remedy, prescription.reason
        self.remedies_total[cast(RemedyName, name)] += 1
        _log.warning("remedy", remedy=name, check=prescription.check, reason=reason)
        try:
            self._remedies[name](reason)
        except (ShoalError, OSError) as error:
            _log.warning("remedy_failed", remedy=name, reason=str(error))

    def _trim(self, reason: str) -> None:
        # A job of the worker may be using what lies there.
        if self._state().phase != "updating":
            self._machine.clear_leavings()
        self._parts.database.erase_leftovers()

    def _roll_back(self, reason: str) -> None:
        self._post(on.ServedBadly(self._state().release_version, reason))

    def _pause(self, reason: str) -> None:
        self._paused_at = self._parts.clock.monotonic()
        self._parts.training_paused = reason

    def _resume(self) -> None:
        if self._parts.training_paused:
            _log.info("training_resumed", paused_seconds=self._parts.clock.monotonic() - self._paused_at)
            self._parts.training_paused = ""
