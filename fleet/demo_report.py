"""What a demo's processes left behind, as a report: the books of the aggregator, the status of the agents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cloud_server.db import releases as release_table
from cloud_server.db import rounds as books
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud
from fleet.report import DeviceRow, FleetReport, ReleaseRow, RoundRow, SwapRow
from models.bundle import Bundle
from models.data.federation import Federation
from models.evaluate import evaluate
from wire.manifest import TEMPLATE
from wire.materialize import materialize_int8


def make_report(
    dataset: str,
    seed: int,
    federation: Federation,
    bundle: Bundle,
    cloud: LocalCloud,
    agents: Sequence[LocalAgent],
) -> FleetReport:
    """Measures every release on the later windows of every device and puts the books together."""
    judge = _Judge(cloud, bundle)
    released = judge.released()
    rounds = cloud.rounds()
    first, last = released[0].version, released[-1].version
    devices = tuple(
        _device_row(agent, federation, judge.updates(agent.device), judge, first, last) for agent in agents
    )
    all_x = np.concatenate([split.test_x for split in federation.devices.values()])
    all_y = np.concatenate([split.test_y for split in federation.devices.values()])
    return FleetReport(
        title=f"Shoal demo: {dataset}, {len(agents)} devices",
        seed=seed,
        split_hash=federation.split_hash(),
        devices=devices,
        rounds=tuple(_round_row(row, released) for row in rounds),
        releases=tuple(
            ReleaseRow(row.version, row.round, judge.accuracy(row.version, all_x, all_y)) for row in released
        ),
        swaps=tuple(swap for agent in agents for swap in _swaps(agent)),
        facts={
            "model": bundle.manifest.model,
            "strategy": cloud.settings.run.strategy,
            "codec": cloud.settings.train.codec,
            "broker": cloud.settings.broker.kind,
        },
    )


class _Judge:
    """Reads the aggregator's books and measures releases."""

    def __init__(self, cloud: LocalCloud, bundle: Bundle) -> None:
        self._cloud = cloud
        self._bundle = bundle
        self._files: dict[int, bytes] = {}
        self._by_device: dict[str, list[books.UpdateRow]] = defaultdict(list)
        run = cloud.settings.run.name
        with cloud.deployment.database.read() as connection:
            for row in books.load_rounds(connection, run):
                for update in books.load_updates(connection, run, row.number, "train", "folded"):
                    self._by_device[update.device].append(update)

    def released(self) -> list[release_table.ReleaseRow]:
        """Every release that went out, by version."""
        with self._cloud.deployment.database.read() as connection:
            rows = release_table.load_releases(connection)
        return sorted(
            (row for row in rows if row.state == release_table.RELEASED), key=lambda row: row.version
        )

    def updates(self, device: str) -> list[books.UpdateRow]:
        """The device's folded updates."""
        return self._by_device[device]

    def accuracy(self, version: int, x: np.ndarray, y: np.ndarray) -> float:
        """Share of right answers of a release's int8 file."""
        if version not in self._files:
            checkpoint = self._cloud.deployment.publisher.checkpoint(version)
            template = self._bundle.read(TEMPLATE)
            self._files[version] = materialize_int8(template, self._bundle.manifest, checkpoint)
        return evaluate(self._files[version], self._bundle.manifest.task, x, y).metric

    def float32_bytes(self, updates: int) -> int:
        """What so many updates would have been as plain float32 vectors."""
        return updates * 4 * self._bundle.manifest.params_size


def _device_row(
    agent: LocalAgent,
    federation: Federation,
    updates: Sequence[books.UpdateRow],
    judge: _Judge,
    first: int,
    last: int,
) -> DeviceRow:
    split = federation.devices[agent.device]
    status = agent.status()
    return DeviceRow(
        device=agent.device,
        group=agent.device.rsplit("-", 1)[0],
        test_windows=len(split.test_x),
        accuracy_first=judge.accuracy(first, split.test_x, split.test_y),
        accuracy_last=judge.accuracy(last, split.test_x, split.test_y),
        updates=len(updates),
        update_bytes=sum(update.size_bytes for update in updates),
        float32_bytes=judge.float32_bytes(len(updates)),
        sent_bytes=int(status.get("sent_bytes_total", 0)),
        received_bytes=int(status.get("received_bytes_total", 0)),
        requests=agent.answered + agent.errors,
        errors=agent.errors + (agent.sent - agent.answered - agent.errors),
    )


def _round_row(row: books.RoundRow, released: Sequence[release_table.ReleaseRow]) -> RoundRow:
    versions = [release.version for release in released if release.round == row.number and release.run]
    decision = f"released {versions[0]}" if versions else f"held: {row.reason}" if row.reason else ""
    return RoundRow(
        number=row.number,
        state=row.state,
        replies=int(row.metrics.get("train_devices", 0)),
        validation_accuracy=row.metrics.get("accuracy"),
        decision=decision if row.state == "done" else row.reason,
        seconds=row.ended - row.started if row.ended else None,
    )


def _swaps(agent: LocalAgent) -> list[SwapRow]:
    swaps = agent.status().get("swaps", [])
    return [
        SwapRow(agent.device, int(swap["to"]), int(swap["requests"]), int(swap["errors"]))
        for swap in swaps
        if swap["from"]
    ]
