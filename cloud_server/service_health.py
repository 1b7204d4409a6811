"""The health of a running service: what it knows beyond the state folder, and what its remedies do.

Law of the file: wiring only; the rules stand in `checks/` and `remedies/`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from cloud_server.assembly import Assembled
from cloud_server.checks.facts import Facts
from cloud_server.deployment import Deployment
from cloud_server.health import CloudHealth
from cloud_server.metrics_reading import EventQueue, Throttled
from cloud_server.remedies import pause_training, reconnect, renew, trim
from cloud_server.rounds.runner import RoundRunner

SIGNATURES_SECONDS: Final = 3600.0
_QUIET_SHARE: Final = 2.0 / 3.0
"""Of the silence after which a device counts as gone: when all of them are silent so long, it is not they."""
_STALE_IMPORT_SECONDS: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the health of a service sees and moves.

    Attributes:
        queue_room: of the loop's queue of events.
        rejoin: leaves the broker and joins it again.
        renewers: each shows a certificate of today from the next connection on.
        runner: the run under way, if there is one.
    """

    assembled: Assembled
    events: EventQueue
    queue_room: int
    rejoin: Callable[[str], None]
    renewers: list[Callable[[], object]]
    runner: Callable[[], RoundRunner | None]


def look_after(deployment: Deployment, around: Surroundings) -> CloudHealth:
    """The health of one running service."""
    dropped_before = 0

    def live(facts: Facts) -> Facts:
        nonlocal dropped_before
        assembled, now = around.assembled, deployment.clock.monotonic()
        link = assembled.aggregator.link
        dropped = assembled.sender.dropped_total
        since, dropped_before = dropped - dropped_before, dropped
        return replace(
            facts,
            is_connected=link.away_since is None,
            away_seconds=0.0 if link.away_since is None else now - link.away_since,
            silent_seconds=now - link.heard_at,
            quiet_seconds=deployment.settings.broker.silent_seconds * _QUIET_SHARE,
            present=len(deployment.registry.present()),
            waiting_share=around.events.waiting() / around.queue_room,
            dropped=since,
        )

    def make_anew(reason: str) -> None:
        for show in around.renewers:
            show()

    def hold(reason: str) -> None:
        runner = around.runner()
        if runner is not None:
            runner.hold(bool(reason))

    return CloudHealth(
        deployment,
        live=live,
        remedies={
            trim.NAME: lambda reason: _make_room(deployment),
            renew.NAME: make_anew,
            reconnect.NAME: around.rejoin,
            pause_training.NAME: hold,
        },
        signatures=Throttled(deployment.repository.expiries, deployment.clock, SIGNATURES_SECONDS),
    )


def _make_room(deployment: Deployment) -> None:
    deployment.database.shorten_log()
    now = deployment.clock.now()
    for left in deployment.folder.bundles.glob(".import-*"):
        # A younger one may be an import under way.
        if now - left.stat().st_mtime > _STALE_IMPORT_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
