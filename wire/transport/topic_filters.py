"""Topic names, topic filters and the size of a PUBLISH: the parts of MQTT that every transport must agree on.

Source: MQTT 5.0, clauses 3.3 (PUBLISH) and 4.7 (topic names and filters).
"""

from __future__ import annotations

from wire.errors import ConfigurationError
from wire.transport import Packet

_MAX_TOPIC_BYTES = 65_535


def check_filter(topic_filter: str) -> None:
    """Refuses a filter that a broker would refuse or never match.

    Raises:
        ConfigurationError: (us) empty, too long, a wildcard inside a level, or levels after `#`.
    """
    levels = topic_filter.split("/")
    bad_plus = any("+" in level and level != "+" for level in levels)
    bad_hash = any("#" in level for level in levels[:-1]) or ("#" in levels[-1] and levels[-1] != "#")
    if not topic_filter or bad_plus or bad_hash or len(topic_filter.encode()) > _MAX_TOPIC_BYTES:
        raise ConfigurationError(f"{topic_filter[:200]!r} is no topic filter", topic_filter=topic_filter)


def check_packet(packet: Packet) -> None:
    """Refuses a packet that no broker takes.

    Raises:
        ConfigurationError: (us) an empty or too long topic, a wildcard in it, or a QoS other than 0 and 1.
    """
    topic = packet.topic
    if not topic or "+" in topic or "#" in topic or "\0" in topic or len(topic.encode()) > _MAX_TOPIC_BYTES:
        raise ConfigurationError(f"{topic[:200]!r} is no topic to publish to", topic=topic)
    if packet.qos not in (0, 1):
        raise ConfigurationError(f"QoS {packet.qos} is not used on this wire", hint="use 0 or 1")


def is_wildcard(topic_filter: str) -> bool:
    """Whether the filter can match more than one topic."""
    return "+" in topic_filter or "#" in topic_filter


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a topic falls under a filter. `$SYS` and its like fall under no leading wildcard."""
    wanted, given = topic_filter.split("/"), topic.split("/")
    if given[0].startswith("$") and wanted[0] in ("+", "#"):
        return False
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(given) or (level != "+" and level != given[index]):
            return False
    return len(wanted) == len(given)


def publish_size_bytes(packet: Packet) -> int:
    """The bytes that a PUBLISH of this packet takes, fixed header included: what CONNACK limits."""
    properties = 1 + (5 if packet.expiry_seconds is not None else 0)
    identifier = 2 if packet.qos else 0
    remaining = 2 + len(packet.topic.encode()) + identifier + properties + len(packet.payload)
    length_bytes = 1 + (remaining > 127) + (remaining > 16_383) + (remaining > 2_097_151)
    return 1 + length_bytes + remaining
