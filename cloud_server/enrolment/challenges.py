"""Challenges that a device signs: made without keeping them, good once and for two minutes.

Laws of the file: asking for one costs no memory, so that nobody can push others' out; one that was used is
remembered until it would expire anyway, and only a valid signature uses one. A restart forgets all of them: a
device asks again.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from typing import Final

from process.clock import Clock

LIFE_SECONDS: Final = 120.0
_RANDOM_BYTES: Final = 16
_TIME_BYTES: Final = 8
_MAC_BYTES: Final = 16


class Challenges:
    """The challenges of one process. Safe to use from many threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._used: dict[bytes, float] = {}

    def make(self) -> str:
        """A new one, in hex."""
        ends = int(1000 * (self._clock.monotonic() + LIFE_SECONDS))
        plain = ends.to_bytes(_TIME_BYTES, "big") + secrets.token_bytes(_RANDOM_BYTES)
        return (plain + self._mac(plain)).hex()

    def is_open(self, challenge: str) -> bool:
        """Whether it is one of ours, young, and not used yet."""
        parts = self._parts(challenge)
        if parts is None:
            return False
        plain, ends = parts
        with self._lock:
            return self._clock.monotonic() <= ends and plain not in self._used

    def use(self, challenge: str) -> bool:
        """Uses it up; False when it was not open any more."""
        parts = self._parts(challenge)
        if parts is None:
            return False
        plain, ends = parts
        now = self._clock.monotonic()
        with self._lock:
            self._used = {each: end for each, end in self._used.items() if end >= now}
            if now > ends or plain in self._used:
                return False
            self._used[plain] = ends
        return True

    def _parts(self, challenge: str) -> tuple[bytes, float] | None:
        """What was authenticated and when it ends (monotonic seconds); None for what is not of ours."""
        try:
            raw = bytes.fromhex(challenge)
        except ValueError:
            return None
        plain, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if len(raw) != _TIME_BYTES + _RANDOM_BYTES + _MAC_BYTES:
            return None
        if not hmac.compare_digest(mac, self._mac(plain)):
            return None
        return plain, int.from_bytes(plain[:_TIME_BYTES], "big") / 1000

    def _mac(self, plain: bytes) -> bytes:
        return hmac.digest(self._key, plain, hashlib.sha256)[:_MAC_BYTES]
