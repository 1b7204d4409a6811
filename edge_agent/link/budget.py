"""What an idle agent costs a link, and the keepalive that a budget allows: the arithmetic behind `[link]`.

An idle agent is connected, answers inferences, and hears of no round and no release. A day of it costs, in bytes,

    86,400 × (PING / keepalive + HEARTBEAT / heartbeat + REPORT / report + CHECK / check)

The four costs are of TLS over IPv4 with all headers, as the kernel counts them, rounded up;
`tests/edge/test_link_bytes.py` measures each against mosquitto and the aggregator's own HTTPS port, and fails when
one costs more than stands here. Laws of the file: pure. Source: docs/how-to/links.md.
"""

from __future__ import annotations

from typing import Final

DAY_SECONDS: Final = 86_400.0
PING_BYTES: Final = 260
"""PINGREQ (24 bytes in a TLS record), PINGRESP, an acknowledgement, each with 52 bytes of headers; and what a network
that loses one packet in ten sends again."""
HEARTBEAT_BYTES: Final = 1_150
"""A sealed heartbeat (256 bytes padded, envelope, topic) and the acknowledgement of its segment."""
REPORT_BYTES: Final = 1_150
CHECK_BYTES: Final = 14_000
"""A TLS 1.3 handshake with certificates on both sides, and the signed metadata when nothing is new."""
IDLE_SHARE: Final = 0.5
"""Of a budget: more is never reserved for an idle agent, and the keepalive is made so long that it needs less."""
LEAST_KEEPALIVE: Final = 30
MOST_KEEPALIVE: Final = 600
"""What our broker lets a client ask for (`max_keepalive`)."""


def idle_bytes_a_day(*, keepalive: float, heartbeat: float, report: float, check: float) -> float:
    """What an idle agent costs; all arguments are the seconds between two of them."""
    return DAY_SECONDS * (
        PING_BYTES / keepalive + HEARTBEAT_BYTES / heartbeat + REPORT_BYTES / report + CHECK_BYTES / check
    )


def keepalive_for(
    bytes_a_day: float, *, nat_seconds: float, heartbeat: float, report: float, check: float
) -> int:
    """The keepalive of a link with a budget: the shortest for which an idle agent stays within its share, at least 30
    s, and at most nine tenths of what the network keeps a silent connection for.

    Args:
        bytes_a_day: of the budget; infinity for a link without one.
        nat_seconds: after so long a silence somebody on the way forgets the connection.
    """
    most = int(max(LEAST_KEEPALIVE, min(MOST_KEEPALIVE, 0.9 * nat_seconds)))
    rest = idle_bytes_a_day(keepalive=float("inf"), heartbeat=heartbeat, report=report, check=check)
    left = IDLE_SHARE * bytes_a_day - rest
    if left <= 0.0:
        return most
    wanted = DAY_SECONDS * PING_BYTES / left
    return min(most, max(LEAST_KEEPALIVE, int(-(-wanted // 1))))
