"""What an agent is made of: the parts that its shell, its ears and its status share. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_agent.heads import Heads
from edge_agent.identity import Identity
from edge_agent.install import Installer
from edge_agent.orders import Orders
from edge_agent.outbox import Outbox
from edge_agent.outgoing import Outgoing
from edge_agent.ports import Engine, Worker
from edge_agent.samples import SampleStore
from edge_agent.serving import Serving
from edge_agent.settings import EdgeSettings
from edge_agent.slots import SlotStore
from edge_agent.speaker import Speaker
from edge_agent.storage import Database
from process.clock import Clock
from wire.codec import ErrorFeedback


@dataclass(slots=True)
class Parts:
    """Everything that an agent is made of, and its counters.

    Attributes:
        boot_id: names this life of the process.
        sealed_to: the key that an update of this life was sealed to, by update id.
        left_over: what a biased codec left out of an update that is not stored yet, by update id.
    """

    settings: EdgeSettings
    identity: Identity
    clock: Clock
    database: Database
    slots: SlotStore
    engine: Engine
    worker: Worker
    installer: Installer
    serving: Serving
    speaker: Speaker
    outgoing: Outgoing
    outbox: Outbox
    orders: Orders
    samples: SampleStore
    heads: Heads
    boot_id: bytes
    max_packet_bytes: int = 131_072
    received_bytes_total: int = 0
    feedback_correct: int = 0
    feedback_total: int = 0
    started_at: float = 0.0
    stopping: bool = False
    sealed_to: dict[bytes, bytes] = field(default_factory=dict)
    left_over: dict[bytes, ErrorFeedback] = field(default_factory=dict)
