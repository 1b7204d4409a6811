"""A broker that drops, doubles, delays, replays, cuts and swaps what an honest fleet signs frames nobody."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

import fleet.simulation
from cloud_server.assembly import RunConfig
from cloud_server.db.audit import load_audit
from cloud_server.db.devices import APPROVED
from cloud_server.db.rounds import load_rounds, load_updates
from cloud_server.rounds.state import RoundPolicy
from cloud_server.strikes import StrikePolicy
from fleet.simulation import Simulation
from models.bundle import Bundle
from tests.fleet.thirds import make_federation
from wire.messages import TrainConfig
from wire.transport import Packet
from wire.transport.memory import MemoryBroker

NAMES = ("oak", "elm", "ash", "fir", "yew")
SHARE = 0.06
_KEPT = 400


class HostileBroker(MemoryBroker):
    """Routes most packets as it should, and does to the rest what a broker can do without a key."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.faults: Counter[str] = Counter()
        self._rng = random.Random(20)
        self._seen: list[Packet] = []
        self._held: list[Packet] = []
        self._late: dict[int, list[Packet]] = {}

    def _route(self, packet: Packet) -> None:
        if self._keeps(packet):
            return
        fault = self._draw()
        if fault:
            self.faults[fault] += 1
        if fault == "drop":
            return
        if fault == "delay":
            self._held.append(packet)
            return
        super()._route(packet)
        if packet.payload:
            self._seen.append(packet)
            del self._seen[:-_KEPT]
        if fault == "double":
            super()._route(packet)
        for made in self._forged(fault, packet):
            super()._route(made)
        if self._held and self._rng.random() < 0.2:
            super()._route(self._held.pop(0))

    def _keeps(self, packet: Packet) -> bool:
        """Lets nothing of one device through in a round, and hands all of it over when the next one is under way."""
        levels = packet.topic.split("/")
        if levels[4] != "up":
            return False
        device, number = levels[6], int(levels[7])
        for earlier in [each for each in self._late if each < number]:
            for kept in self._late.pop(earlier):
                self.faults["late"] += 1
                super()._route(kept)
        if device != NAMES[number % len(NAMES)]:
            return False
        self._late.setdefault(number, []).append(packet)
        return True

    def _draw(self) -> str:
        kinds = ("drop", "delay", "double", "replay", "cut", "swap device", "swap topic", "flip")
        index = int(self._rng.random() / SHARE)
        return kinds[index] if index < len(kinds) else ""

    def _forged(self, fault: str, packet: Packet) -> list[Packet]:
        old = self._rng.choice(self._seen) if self._seen else packet
        payload = packet.payload
        match fault:
            case "replay":  # anything that was ever said, orders and invitations of earlier rounds among it
                return self._rng.sample(self._seen, min(5, len(self._seen)))
            case "cut":
                return [replace(packet, payload=payload[: self._rng.randrange(1, len(payload) + 1)])]
            case "swap device":
                named = self._rng.choice(NAMES)
                levels = [named if level in NAMES else level for level in packet.topic.split("/")]
                return [replace(packet, topic="/".join(levels))]
            case "swap topic":
                return [replace(packet, topic=old.topic), replace(old, topic=packet.topic)]
            case "flip":
                at = self._rng.randrange(len(payload))
                return [replace(packet, payload=payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :])]
        return []


@pytest.mark.slow
def test_hostile_broker_cannot_earn_a_device_a_strike(
    thirds_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet.simulation, "MemoryBroker", HostileBroker)
    config = RunConfig(
        run="hostile",
        policy=RoundPolicy(quorum=2, rounds=6, round_seconds=90.0, evaluate_seconds=60.0),
        train=TrainConfig(codec="fp32"),
        strikes=StrikePolicy(limit=1),
    )
    simulation = Simulation(make_federation(*NAMES), thirds_bundle, config, seed=3)
    simulation.run()
    broker = simulation.broker
    assert isinstance(broker, HostileBroker)
    assert min(broker.faults.values()) > 5
    assert len(broker.faults) == 9
    with simulation.base.database.read() as connection:
        entries = [(entry.kind, json.loads(entry.body)) for entry in load_audit(connection)]
        rounds = load_rounds(connection, "hostile")
        late = [
            update
            for row in rounds
            for kind in ("train", "evaluate")
            for update in load_updates(connection, "hostile", row.number, kind, "late")
        ]
    assert sum(bool(row.head_sha256) for row in rounds) == 6
    assert late
    assert [entry for entry in entries if entry[0] in ("device.struck", "device.quarantined")] == []
    rows = simulation.base.registry.devices()
    assert {(row.status, row.strikes) for row in rows} == {(APPROVED, 0)}
    # What it tried was seen: messages that did not open are counted, and nothing else came of them.
    assert simulation.cloud.aggregator.inbox.refused_total.total() > 20
    simulation.close()
