"""Who may read and write which topic at the broker: text of mosquitto's access file.

Laws: a device writes only under its own name and reads only what is for all or for it; the aggregator reads what goes
up and writes what goes down; every level is spelled out, so that no right reaches a topic that the table lacks, which a
device could fill with retained messages that nobody would ever take away. The broker is trusted with none of it: these
rights keep devices from disturbing each other, signatures decide what is believed. Source: docs/protocol.md, clause 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from wire.errors import ConfigurationError
from wire.topics import ID, PREFIX

UP_TOPICS = ("st/{0}", "tm/{0}", "ir/{0}", "jn/{0}", "up/+/{0}/+/+", "nd/{0}/+", "rs/{0}", "es/{0}")
"""What a device writes under its name and the aggregator reads of all."""
DOWN_TOPICS = ("cm/{0}", "ak/{0}", "ea/{0}")
"""What the aggregator writes and one device reads."""
DOWN_TO_ALL_TOPICS = ("rd/+", "md/+", "bl/+/+")
"""What the aggregator writes and every device reads."""


def mosquitto_access(tenant: str, fleet: str, aggregators: Sequence[str]) -> str:
    """The access file of one fleet.

    Args:
        aggregators: common names that read and write for the cloud.

    Raises:
        ConfigurationError: (operator) a name that cannot stand in a topic.
    """
    for name in (tenant, fleet, *aggregators):
        if not ID.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} cannot be a tenant, fleet or user", hint="use A-Z a-z 0-9 _ -"
            )
    base = f"{PREFIX}/{tenant}/{fleet}"
    lines = [
        "# Written by Shoal. A subscription is always granted; what counts is what is delivered.",
        "# Whatever is not listed is refused: another tenant or fleet, $SYS, $CONTROL, and topics of no table.",
    ]
    for name in aggregators:
        lines += ["", f"user {name}"]
        lines += [f"topic read {base}/{topic.format('+')}" for topic in UP_TOPICS]
        lines += [f"topic write {base}/{topic.format('+')}" for topic in (*DOWN_TOPICS, *DOWN_TO_ALL_TOPICS)]
    lines += ["", "# Every device; %u is the name in its certificate."]
    lines += [f"pattern write {base}/{topic.format('%u')}" for topic in UP_TOPICS]
    lines += [f"pattern read {base}/{topic.format('%u')}" for topic in (*DOWN_TOPICS, *DOWN_TO_ALL_TOPICS)]
    return "\n".join(lines) + "\n"
