"""What is known about a device when its health is judged: plain numbers, gathered by a running agent
(`edge_agent/vitals/health.py`) or by `shoal-edge check` (`edge_agent/vitals/check.py`). None stands for what they
cannot know.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One look at a device.

    Attributes:
        free_bytes: on the disk of the state folder.
        disk_trouble: why nothing can be written there, or empty.
        behind_seconds: how far the machine's clock is behind what the aggregator signed.
        skew_seconds: this clock less the aggregator's, now.
        is_connected: to the broker, as the agent sees it.
        away_seconds: since the broker was lost, or since the start without it; 0 while connected.
        broker_trouble: why the broker could not be reached, or empty.
        broker_detail: how it answered, or empty.
        fruitless_sends: most times that one update was sent over this connection without a receipt.
        release_version: that serves; 0 for none.
        model_trouble: why it cannot serve, or empty.
        model_detail: what a self-test measured, or empty.
        requests, errors: of the model that serves, since the look before.
        is_on_probation: the release is new and may still go back.
        watched: why the watch over a new release condemns it, or empty (`edge_agent/release/watch.py`).
        celsius: the hottest of the machine's sensors.
        owed, owed_bytes: updates without a receipt; `owed_limit_bytes` is the outbox's cap, 0 where nobody knows.
        identity_trouble: why the identity cannot be read, and which file it is, or empty.
        certificate_seconds: until the certificate ends; below 0 since then.
        certificate_life_seconds: from its beginning to its end; 0 where nobody knows.
        is_training_paused: by the remedy of that name, for `paused_seconds`.
    """

    free_bytes: int | None = None
    disk_trouble: str = ""
    behind_seconds: float = 0.0
    skew_seconds: float | None = None
    is_connected: bool | None = None
    away_seconds: float = 0.0
    broker_trouble: str = ""
    broker_detail: str = ""
    fruitless_sends: int = 0
    release_version: int = 0
    model_trouble: str = ""
    model_detail: str = ""
    requests: int = 0
    errors: int = 0
    is_on_probation: bool = False
    watched: str = ""
    celsius: float | None = None
    owed: int | None = None
    owed_bytes: int = 0
    owed_limit_bytes: int = 0
    identity_trouble: str = ""
    certificate_seconds: float | None = None
    certificate_life_seconds: float = 0.0
    is_training_paused: bool = False
    paused_seconds: float = 0.0
