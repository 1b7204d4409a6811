"""What is known about an aggregator when its health is judged: plain numbers, gathered by `cloud_server/health.py`
from inside of the running service or from outside of it. None stands for what the gatherer cannot know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One look at an aggregator.

    Attributes:
        free_bytes: on the disk of the state folder.
        disk_trouble: why nothing can be written there, or empty.
        behind_seconds: how far the clock is behind the newest entry of the books; 0 when it is not.
        clock_trouble: why the clock cannot be right, so that nothing is signed; or empty.
        database_trouble: why the database does not answer, or empty.
        is_fenced_off: another service has claimed the database since.
        is_connected: to the broker, as the service sees it; None from outside.
        away_seconds: without the broker; 0 while connected.
        silent_seconds: since the last message of any device; above `quiet_seconds` something is wrong if some are
            present.
        present: devices that are online.
        broker_trouble, broker_detail: what came of connecting to it.
        models: that are imported.
        run, run_status: the newest run; empty for none.
        release_version: that the ring of new devices runs; 0 for none.
        waiting_share: of the room in the queue of events.
        dropped: messages that did not fit into a queue, since the look before.
        stored: updates that wait to be folded.
        signatures: seconds until each TUF role's signature ends, and which of them are due.
        certificate_trouble: why a certificate or the signed metadata cannot be read, or empty.
        certificates: seconds until each certificate in `ca/` ends; below 0 since then.
        renewable: those of them that the service makes anew by itself, a tenth of their life before their end.
        is_held: no round is opened, by the remedy `pause_training`, for `held_seconds`.
    """

    free_bytes: int | None = None
    disk_trouble: str = ""
    behind_seconds: float = 0.0
    clock_trouble: str = ""
    database_trouble: str = ""
    is_fenced_off: bool = False
    is_connected: bool | None = None
    away_seconds: float = 0.0
    silent_seconds: float = 0.0
    quiet_seconds: float = float("inf")
    present: int = 0
    broker_trouble: str = ""
    broker_detail: str = ""
    models: int = 0
    run: str = ""
    run_status: str = ""
    release_version: int = 0
    waiting_share: float | None = None
    dropped: int = 0
    stored: int = 0
    signatures: Mapping[str, float] = field(default_factory=dict)
    signatures_due: tuple[str, ...] = ()
    certificate_trouble: str = ""
    certificates: Mapping[str, float] = field(default_factory=dict)
    renewable: frozenset[str] = frozenset()
    is_held: bool = False
    held_seconds: float = 0.0
