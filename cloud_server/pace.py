"""How fast a fleet may come back: what the aggregator asks its devices to spread over, by their number.

A fleet that lost its broker, its power or its old release begins everything at the same moment. Each device draws its
own moment from a time that is as long as the fleet is large: devices / rate. Laws of the file: pure; a hint is
rounded up to a power of two, so that it changes when a fleet doubles and not with every device; a device bounds it
again (`network.hint_cap_seconds`). Source: docs/protocol.md, 10.11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

MOST_SECONDS: Final = 3600.0
_LEAST_SECONDS: Final = 1.0
"""What a single device would not notice is not worth a hint."""


@dataclass(frozen=True, slots=True)
class Hints:
    """Seconds that a fleet is asked to spread over; 0: as each likes."""

    reconnect_seconds: float = 0.0
    spread_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """What the machines bear; 0 asks for nothing.

    Attributes:
        connections_per_second: to the broker; a TLS handshake costs it a millisecond of one core, and the birth that
            follows costs the aggregator as much.
        downloads_per_second: of releases.
    """

    connections_per_second: float = 50.0
    downloads_per_second: float = 20.0

    def hints(self, devices: int) -> Hints:
        """For a fleet of so many devices."""
        return Hints(
            _spread(devices, self.connections_per_second), _spread(devices, self.downloads_per_second)
        )


def _spread(devices: int, rate: float) -> float:
    if rate <= 0.0 or devices / rate <= _LEAST_SECONDS:
        return 0.0
    return float(min(MOST_SECONDS, 2.0 ** math.ceil(math.log2(devices / rate))))
