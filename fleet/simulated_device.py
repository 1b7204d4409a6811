"""A simulated device: the real agent on the in-memory transport, an in-memory database and virtual time.

Laws of the file: nothing of the agent is replaced but what touches the world outside of it (network, disk, clock, child
process); sessions, self-test verdicts and verified releases are shared by content hash.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.agent import Agent
from edge_agent.enrolment.identity import Identity
from edge_agent.ports import Engine, JobResult, SelfTest, Worker
from edge_agent.release.memory_slots import MemorySlots, SharedReleases
from edge_agent.release.source import ReleaseSource
from edge_agent.rounds.worker import InlineWorker
from edge_agent.settings import EdgeSettings
from edge_agent.store.storage import open_database
from fleet.virtual import VirtualTime
from wire.enrolment import OnlineKey
from wire.primitives import SigningKey
from wire.transport.memory import MemoryBroker, MemoryTransport

TENANT, FLEET = "local", "simulated"


@dataclass(frozen=True, slots=True)
class Shared:
    """What the devices of one simulation share."""

    time: VirtualTime
    broker: MemoryBroker
    releases: ReleaseSource
    slots: SharedReleases
    engine: Engine
    selftest: SelfTest
    settings: EdgeSettings
    tuf_root: bytes
    kem: tuple[OnlineKey, ...]
    orders: tuple[OnlineKey, ...]


def device_key(seed: int, device: str) -> SigningKey:
    """A device's update key, always the same for a seed and a name."""
    return SigningKey.from_bytes(hashlib.sha256(f"device key {seed} {device}".encode()).digest())


def make_identity(
    device: str,
    key: SigningKey,
    tuf_root: bytes,
    kem: tuple[OnlineKey, ...],
    orders: tuple[OnlineKey, ...],
) -> Identity:
    """Who a simulated device is; it has no files and no TLS."""
    return Identity(
        tenant=TENANT,
        fleet=FLEET,
        device=device,
        url_enrol="https://simulated:1",
        url_api="https://simulated:2",
        tls_name="simulated",
        mqtt_host="simulated",
        mqtt_port=1883,
        mqtt_tls=False,
        ca_pem=b"",
        certificate_pem=b"",
        update_key=key,
        tuf_root=tuf_root,
        kem=kem,
        orders=orders,
    )


def make_agent(
    shared: Shared,
    device: str,
    *,
    seed: int,
    cost: Callable[[JobResult], float],
    notify: Callable[[], None],
    behind: Callable[[Worker], Worker] = lambda worker: worker,
) -> Agent:
    """One agent, not started yet.

    Args:
        cost: virtual seconds of a finished job.
        notify: called when something waits for the agent's `pump`.
        behind: puts something between the agent and its worker: where an attacker falsifies what it trained.
    """
    key = device_key(seed, device)
    return Agent(
        shared.settings,
        make_identity(device, key, shared.tuf_root, shared.kem, shared.orders),
        transport=MemoryTransport(shared.broker, device),
        releases=shared.releases,
        clock=shared.time,
        worker=behind(InlineWorker(shared.time.later, cost)),
        rng=random.Random(f"{seed} {device}"),
        database=open_database(":memory:", clock=shared.time),
        slots=MemorySlots(shared.slots),
        selftest=shared.selftest,
        engine=shared.engine,
        notify=notify,
    )
