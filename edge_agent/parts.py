"""What an agent is made of, and how it is joined: what its shell, its ears and its status share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from edge_agent.enrolment.identity import Identity
from edge_agent.inference.serving import Serving
from edge_agent.link.door import Link, plan_of
from edge_agent.ports import Engine, SelfTest, Worker
from edge_agent.release.install import Installer
from edge_agent.release.slots import SlotStore
from edge_agent.release.source import ReleaseSource
from edge_agent.rounds.heads import Heads
from edge_agent.rounds.helper_pin import HelperPin
from edge_agent.rounds.kept_heads import KeptChunks
from edge_agent.rounds.masked_rounds import MaskedRounds
from edge_agent.settings import EdgeSettings
from edge_agent.store.orders import Orders, ReplayWindows
from edge_agent.store.outbox import Outbox
from edge_agent.store.samples import SampleStore
from edge_agent.store.sequence import Sequence
from edge_agent.store.storage import Database
from edge_agent.store.time_floor import FlooredClock
from edge_agent.uplink.online_keys import ONLINE_KEYS_FACT, OnlineKeys
from edge_agent.uplink.outgoing import Outgoing
from edge_agent.uplink.speaker import Speaker
from edge_agent.vitals.tally import Tally
from process.clock import Clock
from process.logs import get_logger
from wire.codec import ErrorFeedback
from wire.errors import ReleaseError, TrustError
from wire.transport import Transport

_log = get_logger("edge_agent")

PROBATION_STARTS_FACT: Final = "probation_starts"


@dataclass(slots=True)
class Parts:
    """Everything that an agent is made of, and its counters.

    Attributes:
        random: gives that many unpredictable bytes; from the worker's thread too.
        boot_id: names this life of the process.
        cloud_epoch: of the cloud's message that was heard last.
        training_paused: why nothing is trained for now (`remedies/pause_training.py`), or empty.
        identity_trouble: why the identity cannot be read, and which file it is, or empty.
        left_over: what a biased codec left out of an update that is not stored yet, by update id.
    """

    settings: EdgeSettings
    identity: Identity
    clock: FlooredClock
    database: Database
    slots: SlotStore
    engine: Engine
    worker: Worker
    installer: Installer
    serving: Serving
    speaker: Speaker
    link: Link
    outgoing: Outgoing
    outbox: Outbox
    orders: Orders
    samples: SampleStore
    heads: Heads
    helper: HelperPin
    masked: MaskedRounds
    random: Callable[[int], bytes]
    boot_id: bytes
    max_packet_bytes: int = 131_072
    received_bytes_total: int = 0
    feedback_correct: int = 0
    feedback_total: int = 0
    started_at: float = 0.0
    tally: Tally = field(default_factory=Tally)
    stopping: bool = False
    cloud_epoch: int = 0
    training_paused: str = ""
    least_agent: str = ""
    identity_trouble: str = ""
    left_over: dict[bytes, ErrorFeedback] = field(default_factory=dict)


def assemble(
    settings: EdgeSettings,
    identity: Identity,
    *,
    transport: Transport,
    releases: ReleaseSource,
    clock: Clock,
    worker: Worker,
    rng: random.Random,
    database: Database,
    slots: SlotStore,
    selftest: SelfTest,
    engine: Engine,
    served_badly: Callable[[int, str], None],
    link: Link | None = None,
    kept: KeptChunks | None = None,
) -> Parts:
    """Joins the parts of one agent; the arguments are those of `Agent` and `Serving`."""
    floored = clock if isinstance(clock, FlooredClock) else FlooredClock(clock, database)
    storage, training = settings.storage, settings.training
    speaker, helper, masked = _of_identity(identity, settings, database, floored, rng.randbytes)
    link = link or Link(plan_of(settings), database, floored)
    return Parts(
        settings=settings,
        identity=identity,
        clock=floored,
        database=database,
        slots=slots,
        engine=engine,
        worker=worker,
        installer=Installer(releases, slots, selftest, engine, database, variant=settings.inference.variant),
        serving=Serving(floored, served_badly),
        speaker=speaker,
        link=link,
        outgoing=Outgoing(transport, link),
        outbox=Outbox(database, max_bytes=storage.outbox_bytes),
        orders=Orders(database),
        samples=SampleStore(
            database,
            max_bytes=storage.sample_bytes,
            retention_seconds=storage.retention_days * 86_400.0,
            precision=storage.precision,
        ),
        heads=Heads(training.max_head_bytes, slots.current, kept),
        helper=helper,
        masked=masked,
        random=rng.randbytes,
        boot_id=rng.randbytes(16),
    )


def take_identity(parts: Parts, identity: Identity) -> None:
    """The device knows who it is, after it was nobody: what speaks for it is made anew; nothing was said before."""
    database, clock = parts.database, parts.clock
    parts.identity, parts.identity_trouble = identity, ""
    parts.speaker, parts.helper, parts.masked = _of_identity(
        identity, parts.settings, database, clock, parts.random
    )


def _of_identity(
    identity: Identity,
    settings: EdgeSettings,
    database: Database,
    clock: FlooredClock,
    random_bytes: Callable[[int], bytes],
) -> tuple[Speaker, HelperPin, MaskedRounds]:
    speaker, training = _speaker(identity, database, clock), settings.training
    helper = HelperPin(training.helper_key, database, tenant=identity.tenant, fleet=identity.fleet)
    masked = MaskedRounds(
        identity,
        random=random_bytes,
        min_members=training.min_masked,
        helper=lambda: helper.key,
        seal=speaker.seal_seed,
    )
    return speaker, helper, masked


def _speaker(identity: Identity, database: Database, clock: FlooredClock) -> Speaker:
    """With the keys of the last release check, where there was one."""
    speaker = Speaker(
        identity,
        sequence=Sequence(database),
        windows=ReplayWindows(database),
        clock=clock,
        machine_now=clock.machine_now,
    )
    kept = database.fact(ONLINE_KEYS_FACT)
    if isinstance(kept, bytes):
        try:
            speaker.trust(OnlineKeys.from_json(kept))
        except (ReleaseError, TrustError) as error:
            # Of another version of this program; the next check brings today's.
            _log.warning("online_keys_unusable", reason=str(error))
    return speaker
