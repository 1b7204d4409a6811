"""What strikes from outside of every node: networks, the broker, clocks, and people at a bad moment.

Laws of the file: an operator acts only while the aggregator runs, and only where there is something to do; a partition
cuts both ways of a device, the broker and the signed repository.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import suppress

from cloud_server.assembly import Base
from fleet.chaos.cloud import CLIENT, CloudNode
from fleet.chaos.device import DeviceNode
from fleet.chaos.faults import Fault
from fleet.chaos.injector import Injector
from fleet.chaos.ledger import Ledger
from fleet.chaos.node import NodeClock
from fleet.virtual import VirtualTime
from wire.errors import ConfigurationError, TrustError
from wire.transport.memory import MemoryBroker

PARTITION_SECONDS = 60.0
JUMP_SECONDS = 90.0
YEAR_2040 = 2_208_988_800.0
MOST_REVOKED = 2
_JUMPS: dict[str, float | None] = {
    "clock_1970": None,
    "clock_2040": None,
    "clock_ahead": 3600.0,
    "clock_behind": -3600.0,
}


class Outside:
    """The world around the nodes of one history.

    Attributes:
        hindered_until: until when devices may rightly wait, because an aggregator's clock was ahead; monotonic.
    """

    def __init__(
        self,
        time: VirtualTime,
        broker: MemoryBroker,
        injector: Injector,
        ledger: Ledger,
        cloud: CloudNode,
        devices: Mapping[str, DeviceNode],
    ) -> None:
        self.hindered_until = 0.0
        self._time = time
        self._broker = broker
        self._injector = injector
        self._ledger = ledger
        self._cloud = cloud
        self._devices = devices
        self._strikes: dict[str, Callable[[Fault, random.Random], None]] = {
            "network.device": self._cut_device,
            "network.cloud": self._cut_cloud,
            "broker": self._wipe_broker,
            "device.clock": self._move_device_clock,
            "cloud.clock": self._move_cloud_clock,
            "operator.rollback": self._roll_back,
        }

    def strike(self) -> None:
        """Lets happen what waits."""
        for point, strike in self._strikes.items():
            if self._can(point):
                self._visit(point, strike)

    def ring_signed(self) -> None:
        """A ring is signed, and half of the devices are not there to hear of it."""
        self._visit("network.release", self._cut_half)

    def updates_heard(self, devices: frozenset[str]) -> None:
        """The aggregator has heard updates, and has not committed them yet: a command ends the trust in a device."""
        heard = sorted(devices - self._ledger.revoked_devices)
        if heard and len(self._ledger.revoked_devices) < MOST_REVOKED:
            self._visit("operator.revoke", lambda _fault, rng: self._revoke(rng.choice(heard)))

    def _visit(self, point: str, strike: Callable[[Fault, random.Random], None]) -> None:
        fault = self._injector.visit(point, "fleet")
        if fault is not None:
            strike(fault, fault.rng())

    def _can(self, point: str) -> bool:
        if point == "operator.rollback":
            stated = self._ledger.models.newest
            return self._cloud.is_up and stated is not None and stated.version > 1 and not stated.is_rollback
        return True

    # ---- networks ----------------------------------------------------------------------------------------------

    def _cut(self, name: str, seconds: float) -> None:
        self._devices[name].is_cut_until = self._time.monotonic() + seconds
        self._broker.cut(name, for_seconds=seconds, reason="partition")

    def _cut_device(self, _fault: Fault, rng: random.Random) -> None:
        self._cut(rng.choice(sorted(self._devices)), rng.uniform(1.0, PARTITION_SECONDS))

    def _cut_half(self, _fault: Fault, rng: random.Random) -> None:
        for name in rng.sample(sorted(self._devices), len(self._devices) // 2):
            self._cut(name, rng.uniform(1.0, PARTITION_SECONDS))

    def _cut_cloud(self, _fault: Fault, rng: random.Random) -> None:
        self._broker.cut(CLIENT, for_seconds=rng.uniform(1.0, PARTITION_SECONDS), reason="partition")

    def _wipe_broker(self, _fault: Fault, rng: random.Random) -> None:
        self._broker.forget_everything(for_seconds=rng.uniform(0.1, 10.0))

    # ---- clocks ------------------------------------------------------------------------------------------------

    def _move_device_clock(self, fault: Fault, rng: random.Random) -> None:
        node = self._devices[rng.choice(sorted(self._devices))]
        self._move(node.clock, fault, rng)

    def _move_cloud_clock(self, fault: Fault, rng: random.Random) -> None:
        """What an aggregator signs with its clock ahead moves its devices' floor, and they wait until that is past; by
        a clock that cannot be right it signs nothing, and nobody waits longer than it does."""
        self._move(self._cloud.clock, fault, rng)
        ahead = max(0.0, self._cloud.clock.jump_seconds) if self._cloud.is_clock_credible else 0.0
        self.hindered_until = max(self.hindered_until, self._time.monotonic() + ahead + JUMP_SECONDS)

    def _move(self, clock: NodeClock, fault: Fault, rng: random.Random) -> None:
        """A clock jumps, and is set right some time later."""
        jump = _JUMPS[fault.kind]
        target = YEAR_2040 if fault.kind == "clock_2040" else 0.0
        clock.jump_seconds = target - self._time.now() if jump is None else jump

        def set_right() -> None:
            clock.jump_seconds = 0.0

        self._time.later(rng.uniform(1.0, JUMP_SECONDS), set_right)

    # ---- people ------------------------------------------------------------------------------------------------

    def _revoke(self, device: str) -> None:
        self._injector.note("operator", f"revokes {device}")
        self._cloud.operate(lambda base: base.registry.revoke(device, "stolen"))

    def _roll_back(self, _fault: Fault, _rng: random.Random) -> None:
        """The ring goes back to the release before the present one."""

        def roll_back(base: Base) -> None:
            with suppress(ConfigurationError, TrustError):  # there is none before it, or the clock is wrong
                base.publisher.rollback(reason="a worse one")

        self._injector.note("operator", "rolls the ring back")
        self._cloud.operate(roll_back)
