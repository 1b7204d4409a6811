"""The topic table: every topic of protocol major version 1, built and parsed in one place.

Source: docs/protocol.md, clause 2. Ids match `[A-Za-z0-9_-]{1,64}`, so no topic can carry a wildcard or a
level separator that a peer chose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wire.errors import MessageError

PREFIX = "fl/1"
MAX_TOPIC_CHARS = 512
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"(?:0|[1-9][0-9]{0,14})")


@dataclass(frozen=True, slots=True)
class Topic:
    """A parsed topic. Fields that a kind does not have are empty or 0; `round_number` is −1 for `rd/now`."""

    kind: str
    device: str = ""
    shard: str = ""
    channel: str = ""
    sha256: str = ""
    round_number: int = 0
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Topics:
    """Topics of one fleet. Every method returns a full topic or topic filter."""

    tenant: str
    fleet: str

    def __post_init__(self) -> None:
        for name in (self.tenant, self.fleet):
            if not ID.fullmatch(name):
                raise MessageError(f"{name!r} cannot stand in a topic", hint="use A-Z a-z 0-9 _ - (1 to 64)")

    @property
    def base(self) -> str:
        return f"{PREFIX}/{self.tenant}/{self.fleet}"

    def by_device(self, kind: str, device: str) -> str:
        """`st tm jn ak cm rs es ea ir` of one device.

        Raises:
            MessageError: (us) as every builder of a topic: a level that `parse` would refuse.
        """
        return self._checked(f"{kind}/{device}")

    def invitation(self, round_number: int | None) -> str:
        """`rd/{round}`, or the retained `rd/now` for None."""
        return self._checked(f"rd/{'now' if round_number is None else round_number}")

    def upload(self, shard: str, device: str, round_number: int, chunk: int) -> str:
        return self._checked(f"up/{shard}/{device}/{round_number}/{chunk}")

    def announcement(self, channel: str) -> str:
        return self._checked(f"md/{channel}")

    def blob_chunk(self, sha256: str, chunk: int) -> str:
        return self._checked(f"bl/{sha256}/{chunk}")

    def need(self, device: str, sha256: str) -> str:
        return self._checked(f"nd/{device}/{sha256}")

    @property
    def blob_filter(self) -> str:
        """All chunks that are broadcast."""
        return f"{self.base}/bl/+/+"

    def device_filters(self, device: str, channel: str) -> tuple[str, ...]:
        """What a device subscribes to: the fleet's `rd`, `md`, `bl` and its own `ak`, `cm`, `ea`."""
        own = tuple(self.by_device(kind, device) for kind in ("ak", "cm", "ea"))
        return (self.invitation(None), self.announcement(channel), self.blob_filter, *own)

    def cloud_filters(self) -> tuple[str, ...]:
        """What the aggregator subscribes to: all that goes up."""
        plain = tuple(f"{self.base}/{kind}/+" for kind in ("st", "tm", "jn", "rs", "es", "ir"))
        return (*plain, f"{self.base}/up/+/+/+/+", f"{self.base}/nd/+/+")

    def _checked(self, levels: str) -> str:
        if _parse_levels(*levels.split("/")) is None:
            raise MessageError("no such topic", topic=levels[:200])
        return f"{self.base}/{levels}"

    def parse(self, topic: str) -> Topic:
        """Takes a topic apart.

        Raises:
            MessageError: (peer) not a topic of this fleet, or a level that is not an id, number or hash.
        """
        if not topic.startswith(self.base + "/"):
            raise MessageError("topic of another fleet or version", topic=topic[:200])
        if len(topic) > MAX_TOPIC_CHARS:
            raise MessageError("topic is longer than any of the table", topic=topic[:200])
        parsed = _parse_levels(*topic[len(self.base) + 1 :].split("/"))
        if parsed is None:
            raise MessageError("topic is not in the table", topic=topic[:200])
        return parsed


_TYPES = {
    "up": frozenset({"up", "ev"}),
    "jn": frozenset({"jn", "mk", "ms", "mo"}),
    "cm": frozenset({"cm", "mr", "mi", "mq"}),
}


def message_types(kind: str) -> frozenset[str]:
    """The header types that a topic of this kind may carry."""
    return _TYPES.get(kind, frozenset({kind}))


_BY_DEVICE = frozenset({"st", "tm", "jn", "ak", "cm", "rs", "es", "ea", "ir"})


def _parse_levels(kind: str, *levels: str) -> Topic | None:
    match kind, levels:
        case _, [device] if kind in _BY_DEVICE and ID.fullmatch(device):
            return Topic(kind, device=device)
        case "rd", ["now"]:
            return Topic(kind, round_number=-1)
        case "rd", [number] if _NUMBER.fullmatch(number):
            return Topic(kind, round_number=int(number))
        case "md", [channel] if ID.fullmatch(channel):
            return Topic(kind, channel=channel)
        case "bl", [sha, chunk] if _HEX64.fullmatch(sha) and _NUMBER.fullmatch(chunk):
            return Topic(kind, sha256=sha, chunk=int(chunk))
        case "nd", [device, sha] if ID.fullmatch(device) and _HEX64.fullmatch(sha):
            return Topic(kind, device=device, sha256=sha)
        case "up", [shard, device, number, chunk] if (
            ID.fullmatch(shard)
            and ID.fullmatch(device)
            and _NUMBER.fullmatch(number)
            and _NUMBER.fullmatch(chunk)
        ):
            return Topic(kind, device=device, shard=shard, round_number=int(number), chunk=int(chunk))
    return None
