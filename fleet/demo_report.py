"""What a demo's processes left behind, as a report: the books of the aggregator, the status of the agents."""

from __future__ import annotations

from collections.abc import Sequence

from fleet.books import Judge, device_row, read_books, release_rows, round_rows
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud
from fleet.report import FleetReport, SwapRow
from models.bundle import Bundle
from models.data.federation import Federation


def make_report(
    dataset: str,
    seed: int,
    federation: Federation,
    bundle: Bundle,
    cloud: LocalCloud,
    agents: Sequence[LocalAgent],
) -> FleetReport:
    """Measures every release on the later windows of every device and puts the books together."""
    deployment, settings = cloud.deployment, cloud.settings
    with deployment.database.read() as connection:
        books = read_books(connection, settings.run.name)
    judge = Judge(bundle, deployment.publisher.checkpoint)
    rows = []
    for agent in agents:
        status = agent.status()
        traffic = (int(status.get("sent_bytes_total", 0)), int(status.get("received_bytes_total", 0)))
        # A window without an answer is an error, too.
        counts = (agent.sent, agent.sent - agent.answered)
        split = federation.devices[agent.device]
        rows.append(device_row(agent.device, split, books, judge, traffic=traffic, counts=counts))
    return FleetReport(
        title=f"Shoal demo: {dataset}, {len(agents)} devices",
        seed=seed,
        split_hash=federation.split_hash(),
        devices=tuple(rows),
        rounds=round_rows(books, judge.task.metric),
        releases=release_rows(books, judge, federation),
        metric=judge.task.metric,
        higher_is_better=judge.task.higher_is_better,
        swaps=tuple(swap for agent in agents for swap in _swaps(agent)),
        facts={
            "model": bundle.manifest.model,
            "strategy": settings.run.strategy,
            "codec": settings.train.codec,
            "broker": settings.broker.kind,
        },
    )


def _swaps(agent: LocalAgent) -> list[SwapRow]:
    return [
        SwapRow(agent.device, int(swap["to"]), int(swap["requests"]), int(swap["errors"]))
        for swap in agent.status().get("swaps", [])
        if swap["from"]
    ]
