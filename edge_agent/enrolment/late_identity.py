"""A device whose identity cannot be read: its model answers, nobody speaks in its name, and it is looked at again.

Laws of the file: what is damaged goes to the quarantine under its name, and what is whole, or only open to others,
stays where it is; no key is ever destroyed here; nothing is sent before the whole identity was read. Answers, samples
and the outbox need no identity: at-rest keys are others (`at_rest.py`). What a device owes belongs to its name: under
another one its orders would be foreign, and it is counted as destroyed. Source: docs/architecture.md, "The agent".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.identity import Identity
from edge_agent.store.orders import Orders
from edge_agent.store.outbox import Outbox
from edge_agent.store.quarantine import Quarantine
from edge_agent.store.storage import Database
from process.logs import get_logger
from wire.enrolment import OnlineKey
from wire.errors import BackpressureError, ShoalError
from wire.primitives import SigningKey, random_bytes
from wire.traffic import Traffic
from wire.transport import Deliver, Packet

if TYPE_CHECKING:  # a simulated device has another one
    from wire.transport.mqtt import MqttTransport

_log = get_logger("edge_agent.enrolment.identity")

LOOK_SECONDS: Final = 5.0
"""Between two looks at an identity that could not be read."""
NOBODY: Final = "unknown"
OWNER_FACT: Final = "owner"
_ALL_ROWS: Final = 2**62


def nobody(folder: Path) -> Identity:
    """Stands in until the identity of a state folder can be read; its keys, and those that it trusts, are nobody's."""
    return Identity(
        tenant=NOBODY,
        fleet=NOBODY,
        device=NOBODY,
        url_enrol="",
        url_api="",
        tls_name="",
        mqtt_host="",
        mqtt_port=0,
        mqtt_tls=False,
        ca_pem=b"",
        certificate_pem=b"",
        update_key=SigningKey.generate(),
        tuf_root=b"",
        kem=(OnlineKey(id="00" * 8, algorithm="x25519", public=random_bytes(32).hex()),),
        orders=(OnlineKey(id="00" * 8, public=SigningKey.generate().public_bytes.hex()),),
        folder=folder / identity_files.FOLDER_NAME,
    )


class LateTransport:
    """The transport of a device that may not know its name yet: until it does, nothing is sent and nothing heard."""

    def __init__(self) -> None:
        self._inner: MqttTransport | None = None

    def become(self, transport: MqttTransport) -> None:
        """What is asked from now on goes to this one."""
        self._inner = transport

    def start(
        self, deliver: Deliver, *, filters: Sequence[tuple[str, int]], will: Packet | None = None
    ) -> None:
        if self._inner is not None:
            self._inner.start(deliver, filters=filters, will=will)

    def publish(self, packet: Packet) -> int:
        if self._inner is None:
            raise BackpressureError("there is no identity to speak with")
        return self._inner.publish(packet)

    def stop(self, last_words: Packet | None = None) -> None:
        if self._inner is not None:
            self._inner.stop(last_words)

    def rejoin(self, reason: str) -> None:
        if self._inner is not None:
            self._inner.rejoin(reason)

    def traffic(self) -> Traffic | None:
        return self._inner.traffic() if self._inner is not None else None

    def mute(self, filters: Collection[str]) -> None:
        if self._inner is not None:
            self._inner.mute(filters)

    def spread(self, seconds: float) -> None:
        if self._inner is not None:
            self._inner.spread(seconds)


class LateIdentity:
    """The identity on a device's disk, read until it is whole.

    Args:
        use: called with it, once: makes what speaks in its name; its `ShoalError` is one of the identity.
        quarantine: where what is damaged goes.

    Attributes:
        trouble: what the newest look found wrong; None before the first, and for an identity that is whole.
    """

    def __init__(self, folder: Path, use: Callable[[Identity], None], quarantine: Quarantine) -> None:
        self._folder = folder
        self._use = use
        self._quarantine = quarantine
        self.trouble: ShoalError | None = None

    def read(self) -> Identity:
        """The whole identity, in use when it returns.

        Raises:
            ShoalError: what is wrong, which file it is, and what to do.
        """
        try:
            identity = identity_files.load(self._folder)
            self._use(identity)
        except ShoalError as error:
            self.trouble = error
            self._put_away(error)
            raise
        self.trouble = None
        return identity

    def _put_away(self, error: ShoalError) -> None:
        name = error.facts.get("damaged_file")
        if not isinstance(name, str):
            return
        place = self._folder / identity_files.FOLDER_NAME / name
        self._quarantine.take(place, f"{identity_files.FOLDER_NAME}/{name}: {error}")
        _log.error("identity_file_quarantined", name=name, reason=str(error))


def settle_owner(
    identity: Identity, database: Database, outbox: Outbox, orders: Orders, now: float
) -> list[bytes]:
    """Sees to it that nobody answers for another device's orders: a machine that was enrolled anew has another name.

    Returns:
        Ids of the updates that ended as `destroyed`.

    Raises:
        StorageError: the disk is full: it is settled with the next start.
    """
    name = f"{identity.tenant}/{identity.fleet}/{identity.device}"
    before = database.fact(OWNER_FACT)
    if before == name:
        return []
    with database.transaction():
        lost: list[bytes] = []
        if isinstance(before, str):
            lost = [update_id for update_id, _ in outbox.owed()]
            outbox.destroy_all(f"made as {before}, and enrolled anew as {name}", now)
            outbox.note_durable(_ALL_ROWS)
            for order in orders.unanswered():
                orders.forget(order.order_id)
            _log.warning("enrolled_anew", before=before, now=name, destroyed=len(lost))
        database.set_fact(OWNER_FACT, name)
    return lost
