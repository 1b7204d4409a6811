"""Keeps one client connected: dials, backs off, feeds the connection from the gate, reports events, ends in
time.

Knows no MQTT: a `Connection` speaks it, over a socket that the keeper dialled. Laws: one connection or
attempt at a time; every end of one is one `Disconnected` with a reason; a receiver that raises is logged and
changes nothing.
"""

from __future__ import annotations

import logging
import random
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from wire.backoff import Backoff, Retries
from wire.errors import ConfigurationError
from wire.traffic import TrafficMeter
from wire.transport import Connected, Deliver, Disconnected, Packet, Published, Received, TransportEvent
from wire.transport.dial import BoundedSocket, Dial
from wire.transport.gate import SendGate
from wire.transport.selector import SelectorLoop

_log = logging.getLogger("wire.transport.keeper")

_STABLE_SECONDS = 10.0  # a connection that lived this long resets the back-off


class Connection(Protocol):
    """One connection of the protocol that is spoken; it reports to the keeper that made it."""

    def open(self) -> None:
        """Introduces us; `Keeper.accepted` or `Keeper.lost` follows."""
        ...

    def send(self, packet: Packet) -> int | None:
        """Hands over a publication; returns the identifier that `Keeper.published` will name, or None."""
        ...

    def mute(self, names: frozenset[str]) -> None:
        """Listens to all filters but these from now on."""
        ...

    def say_goodbye(self, reason: str) -> None:
        """Leaves cleanly; `Keeper.lost` follows with this reason."""
        ...

    def pause(self, is_paused: bool) -> None:
        """Reads nothing more, or reads again."""
        ...

    def close(self) -> None:
        """Closes the socket; nothing is reported any more."""
        ...


class Keeper:
    """The life of one client across its connections.

    Args:
        address: host and port.
        tls: None for plain TCP.
        loop: None makes one of our own, ended with the client.
        gate: what waits to be sent.
        now: monotonic seconds.
        max_packet_bytes: the largest packet that is read.
        stuck_after_seconds: without an acknowledgement the connection is ended.
        stop_timeout_seconds: how long `stop` may take.

    Attributes:
        muted: topic filters that are not listened to.
        meter: counts what all connections of this client cost the link.
    """

    def __init__(
        self,
        address: tuple[str, int],
        tls: ssl.SSLContext | None,
        loop: SelectorLoop | None,
        gate: SendGate,
        *,
        backoff: Backoff,
        rng: random.Random,
        now: Callable[[], float],
        max_packet_bytes: int,
        stuck_after_seconds: float,
        stop_timeout_seconds: float,
    ) -> None:
        self.loop = loop if loop is not None else SelectorLoop()
        self._own_loop = loop is None
        self._address = address
        self._tls = tls
        self._gate = gate
        self._retries = Retries(backoff, rng)
        self._now = now
        self._max_packet_bytes = max_packet_bytes
        self._stuck_after_seconds = stuck_after_seconds
        self._stop_timeout_seconds = stop_timeout_seconds
        self._pump_is_due = threading.Event()
        self._ended = threading.Event()
        self._deliver: Deliver | None = None
        self._connect_over: Callable[[BoundedSocket], Connection] | None = None
        self._dial: Dial | None = None
        self._connection: Connection | None = None
        self._tokens: dict[int, int] = {}
        self._live_since = self._reads_since = 0.0
        self._is_paused = False
        self.muted: frozenset[str] = frozenset()
        self.meter = TrafficMeter()

    def start(self, deliver: Deliver, connect_over: Callable[[BoundedSocket], Connection]) -> None:
        """Begins; `deliver` is called on the loop's thread.

        Raises:
            ConfigurationError: (us) it was stopped before.
        """
        if self._gate.is_stopping:
            raise ConfigurationError("a stopped transport does not start again")
        self._deliver = deliver
        self._connect_over = connect_over
        self.loop.start()
        first = self._retries.first_seconds()
        if first:
            self.loop.call_later(first, self._connect)
        else:
            self.loop.call_soon(self._connect)

    def publish(self, packet: Packet) -> int:
        """Queues one publication and returns its token. Safe from any thread; raises as `SendGate.admit`
        does.
        """
        token = self._gate.admit(packet)
        self._pump_soon()
        return token

    def drop(self, reason: str) -> None:
        """Cuts the connection, if there is one. Safe from any thread."""
        self.loop.call_soon(lambda: self.lost(reason) if self._connection is not None else None)

    def rejoin(self, reason: str) -> None:
        """Leaves cleanly and connects again, if there is a connection. Safe from any thread."""
        self.loop.call_soon(
            lambda: self._connection.say_goodbye(reason) if self._connection is not None else None
        )

    def pause(self, is_paused: bool) -> None:
        """Reads nothing more, or reads again; also on later connections. Safe from any thread."""
        self.loop.call_soon(lambda: self._pause(is_paused))

    def use_tls(self, tls: ssl.SSLContext) -> None:
        """The context of every later connection. Safe from any thread."""
        self._tls = tls

    def spread(self, seconds: float) -> None:
        """The fleet shall come back over so many seconds after a connection is lost. Safe from any thread."""
        self._retries.spread_seconds = seconds

    def mute(self, names: frozenset[str]) -> None:
        """Every connection listens to all filters but these. Safe from any thread."""
        self.muted = names
        self.loop.call_soon(lambda: self._connection.mute(names) if self._connection is not None else None)

    def stop(self, last_words: Packet | None) -> None:
        """Sends what is queued and the last words, then leaves, within the time-out. Safe to call twice."""
        first = self._gate.stop(last_words)
        serves = self._deliver is not None and self.loop.is_running
        if first and serves:
            self.loop.call_later(self._stop_timeout_seconds, self._end)
            self.loop.call_soon(self._pump)
        if self.loop.is_current():
            return  # the receiver itself stops us: the rest happens behind it
        if serves:
            self._ended.wait(self._stop_timeout_seconds + 1.0)
        if self._own_loop:
            self.loop.stop()

    # All below runs on the loop's thread; the connection calls what has no underscore.

    def _connect(self) -> None:
        if self._gate.is_stopping:
            self._end()
            return
        self._dial = Dial(
            self.loop,
            *self._address,
            self._tls,
            max_read_bytes=self._max_packet_bytes,
            done=self._dialled,
            meter=self.meter,
        )

    def _dialled(self, connected: BoundedSocket | None, reason: str) -> None:
        self._dial = None
        if connected is None or self._connect_over is None:
            self.lost(reason)
            return
        self._connection = self._connect_over(connected)
        self._connection.open()

    def accepted(self, session_present: bool, max_packet_bytes: int, receive_maximum: int) -> None:
        """CONNACK and SUBACK: we may speak, and we hear."""
        self._live_since = self._now()
        too_large = self._gate.open(max_packet_bytes, receive_maximum)
        self._emit(Connected(session_present, max_packet_bytes, receive_maximum))
        self._refuse(too_large, "larger than the broker accepts")
        self._pump_soon()
        if self._is_paused:
            self.loop.call_soon(lambda: self._pause(self._is_paused))

    def _pause(self, is_paused: bool) -> None:
        self._is_paused, self._reads_since = is_paused, self._now()
        if self._connection is not None and self._gate.is_open:
            self._connection.pause(is_paused)

    def published(self, mid: int, refusal: str, remark: str) -> None:
        """PUBACK, or a QoS 0 publication that was written."""
        token = self._tokens.pop(mid, None)
        if token is not None and self._gate.settle(token):
            self._emit(Published(token, accepted=not refusal, reason=refusal or remark))
            self._pump_soon()

    def received(self, packet: Packet) -> None:
        """PUBLISH."""
        self._emit(Received(packet))

    def is_stuck(self) -> bool:
        """Whether the broker answers pings but no longer acknowledges."""
        oldest = self._gate.oldest_since()
        if oldest is None or self._is_paused:
            return False
        # What was acknowledged in a pause is read after it.
        return self._now() - max(oldest, self._reads_since) > self._stuck_after_seconds

    def lost(self, reason: str, asked_seconds: float = 0.0) -> None:
        """Ends the connection or attempt, tells the receiver, and plans the next.

        Args:
            asked_seconds: the broker wants to be left alone for so long.
        """
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        was_live = self._gate.is_open
        self._tokens.clear()
        self._refuse(self._gate.shut(), "the connection was lost")
        self._emit(Disconnected(reason))
        if self._gate.is_stopping:
            self._end()
            return
        if was_live and self._now() - self._live_since >= _STABLE_SECONDS:
            self._retries.succeeded()
        self.loop.call_later(self._retries.failed(asked_seconds=asked_seconds), self._connect)

    def _pump_soon(self) -> None:
        if not self._pump_is_due.is_set():
            self._pump_is_due.set()
            self.loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Hands paho what the window lets through."""
        self._pump_is_due.clear()
        while self._connection is not None and self._gate.is_open:
            entry = self._gate.take(self._now())
            if entry is None:
                break
            mid = self._connection.send(entry.packet)
            if mid is None:
                self.lost("the connection was lost")
                return
            self._tokens[mid] = entry.token
        if self._gate.is_stopping:
            self._leave_when_idle()

    def _leave_when_idle(self) -> None:
        if self._connection is None or not self._gate.is_open:
            self._end()
        elif self._gate.is_idle:
            self._connection.say_goodbye("stopped")

    def _end(self) -> None:
        """The end of `stop`, whether all was said or the time is over."""
        if self._ended.is_set():
            return
        if self._dial is not None:
            self._dial.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._emit(Disconnected("stopped before everything was sent"))
        self._refuse([*self._gate.shut(), *self._gate.drop_all()], "stopped")
        self._ended.set()
        if self._own_loop:
            self.loop.stop()

    def _refuse(self, tokens: Sequence[int], reason: str) -> None:
        for token in tokens:
            self._emit(Published(token, accepted=False, reason=reason))

    def _emit(self, event: TransportEvent) -> None:
        if self._deliver is None:
            return
        try:
            self._deliver(event)
        except Exception:  # noqa: BLE001 — through paho it would leave a half-read packet behind
            _log.exception("receiver_failed")
