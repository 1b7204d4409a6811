"""How often strangers may ask: a bucket for each address and one for all of them.

Laws of the file: pure, but for the clock; its memory is bounded whatever addresses come; a request that is
refused for its address takes nothing from the others.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from process.clock import Clock

MAX_ADDRESSES: Final = 16_384
_MINUTE: Final = 60.0
# Whoever has one IPv6 address has a /64 of them.
_IPV6_PREFIX: Final = 64


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class RateLimit:
    """Requests a minute; as many may come at once. Not safe to use from many threads.

    Args:
        per_address: of one IPv4 address, or one /64 of IPv6.
        overall: of all together.
    """

    def __init__(self, clock: Clock, *, per_address: int, overall: int) -> None:
        self._clock = clock
        self._per_address = float(per_address)
        self._overall_limit = float(overall)
        self._overall = _Bucket(self._overall_limit, clock.monotonic())
        self._by_address: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, address: str) -> float:
        """Lets one request through, or says how many seconds it should wait; 0 lets it through."""
        now = self._clock.monotonic()
        place = _place(address)
        own = self._by_address.pop(place, None) or _Bucket(self._per_address, now)
        self._by_address[place] = own
        while len(self._by_address) > MAX_ADDRESSES:
            self._by_address.popitem(last=False)
        waits = max(_wait(own, self._per_address, now), _wait(self._overall, self._overall_limit, now))
        if waits:
            return waits
        own.left -= 1.0
        self._overall.left -= 1.0
        return 0.0


def _wait(bucket: _Bucket, limit: float, now: float) -> float:
    """Fills a bucket up to now; seconds until it has one request, 0 if it has."""
    bucket.left = min(limit, bucket.left + max(0.0, now - bucket.at) * limit / _MINUTE)
    bucket.at = now
    return 0.0 if bucket.left >= 1.0 else (1.0 - bucket.left) * _MINUTE / limit


def _place(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
    return str(parsed)
