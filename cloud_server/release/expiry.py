"""When a signature that devices trust ends, and the alarm long before: offline roles need a person and a safe.

Law of the file: an alarm comes so early that what it asks for can be done by people who have to meet for it.
Source: docs/runbook.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cloud_server.release.tuf_repository import TufRepository
from cloud_server.release.tuf_signing import TufExpiry
from process.clock import Clock
from process.logs import get_logger

_log = get_logger("cloud.release")

DAY: Final = 86_400.0
OFFLINE_ALARM_DAYS: Final = {"root": 60.0, "targets": 30.0}
ONLINE_ALARM_SHARE: Final = 0.25
"""Online roles are signed again at half of their life: with a quarter left something keeps the service from it."""
REPEAT_SECONDS: Final = DAY
CHECK_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class RoleExpiry:
    """One role's newest signature.

    Attributes:
        expires: unix seconds.
        is_due: somebody has to look after it now.
        what_to_do: for the operator.
    """

    role: str
    expires: float
    left_seconds: float
    is_due: bool
    what_to_do: str


def judge_expiries(expiries: Mapping[str, float], lives: TufExpiry, now: float) -> list[RoleExpiry]:
    """Every role, the one that ends first in front."""
    found = []
    for role, expires in expiries.items():
        life = float(getattr(lives, role))
        # A short life of the settings must not be an alarm from its first day.
        alarm_days = min(OFFLINE_ALARM_DAYS.get(role, life * ONLINE_ALARM_SHARE), life / 2)
        left = expires - now
        command = f"bring the offline keys and run: shoal-cloud keys sign {role}"
        what = (
            command if role in OFFLINE_ALARM_DAYS else "the service signs it by itself: see why it does not"
        )
        found.append(RoleExpiry(role, expires, left, left < alarm_days * DAY, what))
    return sorted(found, key=lambda each: each.expires)


class ExpiryAlarm:
    """Says in the log, once a day and role, that a signature ends soon."""

    def __init__(self, repository: TufRepository, clock: Clock) -> None:
        self._repository = repository
        self._clock = clock
        self._said: dict[str, float] = {}
        self._next_check = 0.0

    def tick(self) -> list[str]:
        """Looks when it is time to; returns the roles that it spoke of.

        Raises:
            StorageError: (disk) the store cannot be read.
            ReleaseError: (disk) the repository is damaged.
        """
        now = self._clock.now()
        if 0.0 <= self._next_check - now <= CHECK_SECONDS:
            return []
        self._next_check = now + CHECK_SECONDS
        spoken = []
        for each in judge_expiries(self._repository.expiries(), self._repository.expiry, now):
            # A clock that was set back must not silence it.
            if each.is_due and not 0.0 <= now - self._said.get(each.role, -REPEAT_SECONDS) < REPEAT_SECONDS:
                self._said[each.role] = now
                spoken.append(each.role)
                days = round(each.left_seconds / DAY, 2)
                _log.warning("signature_ends_soon", role=each.role, days_left=days, hint=each.what_to_do)
        return spoken
