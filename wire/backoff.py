"""When to try again: the one rule by which a device comes back to a broker, a server, or with an update.

Exponential back-off with *full* jitter: the wait is drawn evenly from nothing up to a ceiling that doubles, so that a
fleet which lost the same server at the same moment comes back spread over the whole ceiling. What the other side asks
for (`Retry-After`, a broker that says it is busy) is the least wait, within a bound of ours, and is spread again: all
of the fleet were told the same number. Laws of the file: pure, no clock and no sleep; randomness is the caller's; what
a peer says makes nobody wait longer than twice `hint_cap_seconds`, or that and the ceiling. Sources:
docs/how-to/links.md; M. Brooker, "Exponential Backoff And Jitter" (2015).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_MOST_DOUBLINGS = 32


@dataclass(frozen=True, slots=True)
class Backoff:
    """The policy.

    Attributes:
        first_seconds: ceiling before the first repetition.
        cap_seconds: largest ceiling.
        hint_cap_seconds: longest wait that the other side may ask for.
    """

    first_seconds: float = 0.5
    cap_seconds: float = 120.0
    hint_cap_seconds: float = 900.0

    def ceiling_seconds(self, attempt: int) -> float:
        """The longest wait before attempt number `attempt` (from 0), when nobody asked for more."""
        return float(min(self.cap_seconds, self.first_seconds * 2.0 ** min(attempt, _MOST_DOUBLINGS)))

    def delay_seconds(
        self,
        attempt: int,
        rng: random.Random,
        *,
        asked_seconds: float = 0.0,
        spread_seconds: float = 0.0,
    ) -> float:
        """The wait before attempt number `attempt` (from 0).

        Args:
            asked_seconds: the least wait that the other side asked for; bounded here.
            spread_seconds: the fleet was asked to spread over so much; bounded here.
        """
        least = min(max(0.0, asked_seconds), self.hint_cap_seconds)
        spread = min(max(0.0, spread_seconds), self.hint_cap_seconds)
        return least + rng.uniform(0.0, max(self.ceiling_seconds(attempt), least, spread))


class Retries:
    """One thing that is tried until it works: the policy and how often it failed since it last did.

    Attributes:
        spread_seconds: what the fleet was asked to spread every attempt over.
    """

    def __init__(self, policy: Backoff, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self.failures = 0
        self.spread_seconds = 0.0

    def failed(self, *, asked_seconds: float = 0.0) -> float:
        """Counts a failure; returns the wait before the next attempt."""
        delay = self._policy.delay_seconds(
            self.failures, self._rng, asked_seconds=asked_seconds, spread_seconds=self.spread_seconds
        )
        self.failures += 1
        return delay

    def first_seconds(self) -> float:
        """The wait before the very first attempt: nothing, unless the fleet was asked to spread."""
        return self._rng.uniform(0.0, min(max(0.0, self.spread_seconds), self._policy.hint_cap_seconds))

    def succeeded(self) -> None:
        """The next failure is the first again."""
        self.failures = 0
