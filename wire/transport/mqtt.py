"""MQTT 5 behind the transport seam; the only file that imports paho.

paho's traps, and what is done about each: its queue is unlimited (`window.py` is the queue), its errors are
return codes (every one ends the connection with a reason), an exception in a callback kills its thread
(callbacks only take notes and enqueue; a receiver that raises is logged), its threads and `select` do not
scale (`selector.py` drives it), it forgets CONNACK's limits and then reconnects for ever with the packet that
was too large (size and window are ours), its reconnect has no jitter (a new paho client is made for every
connection, so none of its state outlives one). Laws: the caller never blocks, except in `stop`, which is
bounded; paho is touched on the loop's thread only; never a clean start for a session that shall persist.
Source: docs/protocol.md, clause 5; MQTT 5.0.
"""

from __future__ import annotations

import functools
import logging
import random
import selectors
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from wire.errors import BackpressureError, ConfigurationError, OversizeError
from wire.transport import (
    Connected,
    Deliver,
    Disconnected,
    Monotonic,
    Packet,
    Published,
    Received,
    TransportEvent,
)
from wire.transport.dial import Backoff, BoundedSocket, Dial
from wire.transport.selector import SelectorLoop
from wire.transport.topic_filters import check_filter, check_packet, publish_size_bytes
from wire.transport.window import SendWindow

_log = logging.getLogger("wire.transport.mqtt")

DEFAULT_MAX_PACKET_BYTES = 131_072  # hosted brokers stop at 128 KB
_RECEIVE_MAXIMUM = 64
_CONNECT_TIMEOUT_SECONDS = 15.0
_STABLE_SECONDS = 10.0  # a connection that lived this long resets the back-off
_READS_PER_TURN = 64  # one busy client must not starve the others of its loop


class _PahoClient(paho.Client):
    """paho on a socket that was connected for it (contract-tested: `connect` takes what `_create_socket`
    gives).
    """

    def __init__(self, client_id: str, given: BoundedSocket) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5)
        self._given = given

    def _create_socket(self) -> BoundedSocket:
        return self._given


class MqttTransport:
    """One MQTT 5 client that keeps itself connected.

    Args:
        client_id: stable for the life of the session; a broker that takes it from the certificate expects the
            same.
        host: name or address of the broker; with `tls` also the name that is verified.
        port: of its TCP or TLS listener.
        loop: shared by many clients of a process; None makes one of our own, ended by `stop`.
        tls: None for plain TCP.
        clean_start: forget the session at every connection; only together with `session_expiry_seconds=0`.
        session_expiry_seconds: how long the broker keeps subscriptions and queue while we are away.
        keepalive_seconds: the longest silence; a dead connection is noticed within twice this.
        rng: draws the back-off's jitter.
        clock: measures ages; None is the machine's.
        inflight_window: publications without acknowledgement, at most; CONNACK may narrow it.
        queue_packets: publications that wait behind the window, at most.
        queue_bytes: bytes of those, at most.
        max_packet_bytes: the largest packet in both directions; CONNACK may narrow it.
        backoff: between attempts.
        stop_timeout_seconds: how long `stop` may take to send what is queued.
    """

    def __init__(
        self,
        client_id: str,
        host: str,
        port: int,
        *,
        loop: SelectorLoop | None = None,
        tls: ssl.SSLContext | None = None,
        clean_start: bool = False,
        session_expiry_seconds: int = 7 * 86_400,
        keepalive_seconds: int = 30,
        rng: random.Random | None = None,
        clock: Monotonic | None = None,
        inflight_window: int = 16,
        queue_packets: int = 1_024,
        queue_bytes: int = 64 * 1_048_576,
        max_packet_bytes: int = DEFAULT_MAX_PACKET_BYTES,
        backoff: Backoff | None = None,
        stop_timeout_seconds: float = 5.0,
    ) -> None:
        if clean_start and session_expiry_seconds:
            raise ConfigurationError(
                "a clean start throws away the session that shall persist",
                hint="set session_expiry_seconds=0, or leave clean_start off",
            )
        if not client_id or not host or not 0 < port < 65_536 or keepalive_seconds < 1 or inflight_window < 1:
            raise ConfigurationError(f"cannot connect {client_id!r} to {host!r} port {port}")
        self._client_id = client_id
        self._address = (host, port)
        self._own_loop = loop is None
        self._loop = loop if loop is not None else SelectorLoop()
        self._tls = tls
        self._clean_start = clean_start
        self._session_expiry_seconds = session_expiry_seconds
        self._keepalive_seconds = keepalive_seconds
        self._rng = rng if rng is not None else random.Random()
        self._now = clock.monotonic if clock is not None else time.monotonic
        self._max_packet_bytes = max_packet_bytes
        self._backoff = backoff if backoff is not None else Backoff()
        self._stop_timeout_seconds = stop_timeout_seconds

        self._lock = threading.Lock()  # guards the four below: callers' threads meet the loop's here
        self._window = SendWindow(inflight_window, queue_packets, queue_bytes)
        self._limit_bytes = 0  # 0: not connected
        self._stopping = False
        self._pump_is_due = False

        self._deliver: Deliver | None = None
        self._filters: tuple[tuple[str, int], ...] = ()
        self._will: Packet | None = None
        self._stopped = threading.Event()
        self._ended = False
        self._dial: Dial | None = None
        self._client: _PahoClient | None = None
        self._socket: BoundedSocket | None = None
        self._tokens: dict[int, int] = {}
        self._fault = ""
        self._attempt = 0
        self._live_since = 0.0

    def start(
        self, deliver: Deliver, *, filters: Sequence[tuple[str, int]], will: Packet | None = None
    ) -> None:
        """Connects, keeps connected, subscribes to (topic filter, qos) at every connection.

        `deliver` is called on the loop's thread and may only enqueue. A failed attempt is a `Disconnected`
        too.

        Raises:
            ConfigurationError: (us) a filter or will that no broker takes, or a second start.
        """
        for topic_filter, _ in filters:
            check_filter(topic_filter)
        if will is not None:
            check_packet(will)
        with self._lock:
            if self._deliver is not None or self._stopping:
                raise ConfigurationError(f"transport {self._client_id!r} starts only once")
            self._deliver = deliver
        self._filters = tuple(filters)
        self._will = will
        self._loop.start()
        self._loop.call_soon(self._connect)

    def publish(self, packet: Packet) -> int:
        """Queues one publication and returns its token. Safe from any thread.

        Raises:
            BackpressureError: window and queue are full, or there is no connection.
            OversizeError: larger than the broker said it accepts.
            ConfigurationError: (us) a topic or QoS that cannot be published.
        """
        check_packet(packet)
        with self._lock:
            if not self._limit_bytes or self._stopping:
                raise BackpressureError(
                    "there is no connection to the broker", hint="publish after Connected"
                )
            size = publish_size_bytes(packet)
            if size > self._limit_bytes:
                raise OversizeError(
                    f"a packet of {size} bytes is above the broker's limit of {self._limit_bytes}",
                    hint="cut it into chunks",
                    size_bytes=size,
                    limit_bytes=self._limit_bytes,
                )
            token = self._window.push(packet)
        self._pump_soon()
        return token

    def drop(self, reason: str = "dropped on purpose") -> None:
        """Cuts the connection without a goodbye, as a broken network would: the will goes out, then we
        reconnect.
        """
        self._loop.call_soon(lambda: self._lost(reason) if self._client is not None else None)

    def stop(self, last_words: Packet | None = None) -> None:
        """Sends what is queued and `last_words` if it can, disconnects cleanly and frees the thread.

        Takes at most `stop_timeout_seconds`; when that is not enough the will speaks instead. Safe to call
        twice.
        """
        with self._lock:
            first, self._stopping = not self._stopping, True
            started = self._deliver is not None
            fits = last_words is not None and publish_size_bytes(last_words) <= self._limit_bytes
            if first and fits and last_words is not None:
                self._window.push(last_words, unbounded=True)
        if first and started:
            self._loop.call_later(self._stop_timeout_seconds, self._end)
            self._loop.call_soon(self._stop_when_idle)
            if not self._loop.is_current():
                self._stopped.wait(self._stop_timeout_seconds + 1.0)
        if self._own_loop:
            self._loop.stop()

    # All below runs on the loop's thread.

    def _connect(self) -> None:
        if self._stopping:
            self._end()
            return
        self._dial = Dial(
            self._loop,
            *self._address,
            self._tls,
            timeout_seconds=_CONNECT_TIMEOUT_SECONDS,
            max_read_bytes=self._max_packet_bytes,
            done=self._dialled,
        )

    def _dialled(self, connected: BoundedSocket | None, reason: str) -> None:
        self._dial = None
        if connected is None:
            self._lost(reason)
            return
        client = _PahoClient(self._client_id, connected)
        client.max_inflight_messages_set(0)  # none of paho's: the window is ours
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_disconnect = self._on_disconnect
        client.on_socket_open = lambda *_: self._loop.register(connected, selectors.EVENT_READ, self._ready)
        client.on_socket_close = lambda *_: self._loop.unregister(connected)
        client.on_socket_register_write = lambda *_: self._loop.call_soon(lambda: self._flush(client))
        if self._will is not None:
            will = self._will
            properties = _publish_properties(will.expiry_seconds, PacketTypes.WILLMESSAGE)
            client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
        self._client, self._socket, self._fault = client, connected, ""
        client.connect(
            *self._address,
            self._keepalive_seconds,
            clean_start=self._clean_start,
            properties=self._connect_properties(),
        )
        self._flush(client)
        self._loop.call_later(_CONNECT_TIMEOUT_SECONDS, lambda: self._check_accepted(client))
        self._loop.call_later(self._care_seconds(), lambda: self._care(client))

    def _connect_properties(self) -> Properties:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._session_expiry_seconds
        properties.MaximumPacketSize = self._max_packet_bytes
        properties.ReceiveMaximum = _RECEIVE_MAXIMUM
        return properties

    def _ready(self, events: int) -> None:
        client, connected = self._client, self._socket
        if client is None or connected is None:
            return
        if events & selectors.EVENT_READ:
            for _ in range(_READS_PER_TURN):
                if client.loop_read() != paho.MQTT_ERR_SUCCESS or client.socket() is None:
                    break
                if not connected.pending():
                    break
            else:
                self._loop.call_soon(lambda: self._ready(selectors.EVENT_READ))
        self._flush(client)

    def _flush(self, client: _PahoClient) -> None:
        """Writes what the socket takes, and waits for writability only when something is left."""
        if client is not self._client or self._socket is None:
            return
        if client.socket() is not None and client.want_write():
            client.loop_write()
        if client.socket() is None:
            self._lost(self._fault or self._socket.fault or "the broker closed the connection")
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.want_write() else 0)
        self._loop.modify(self._socket, events, self._ready)

    def _check_accepted(self, client: _PahoClient) -> None:
        if client is self._client and not self._limit_bytes:
            self._lost("the broker did not answer CONNECT")

    def _care_seconds(self) -> float:
        return max(0.25, self._keepalive_seconds / 4)

    def _care(self, client: _PahoClient) -> None:
        """Pings, and ends a connection on which nothing is acknowledged any more."""
        if client is not self._client:
            return
        client.loop_misc()
        with self._lock:
            oldest = self._window.oldest_since()
        if oldest is not None and self._now() - oldest > 4 * self._keepalive_seconds:
            self._lost("the broker no longer acknowledges")
            return
        self._loop.call_later(self._care_seconds(), lambda: self._care(client))
        self._flush(client)

    def _pump_soon(self) -> None:
        with self._lock:
            if self._pump_is_due:
                return
            self._pump_is_due = True
        self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Hands paho what the window lets through."""
        client = self._client
        with self._lock:
            self._pump_is_due = False
        while client is not None and self._limit_bytes:
            with self._lock:
                entry = self._window.take(self._now())
            if entry is None:
                break
            packet = entry.packet
            properties = _publish_properties(packet.expiry_seconds, PacketTypes.PUBLISH)
            sent = client.publish(packet.topic, packet.payload, packet.qos, packet.retain, properties)
            if sent.rc != paho.MQTT_ERR_SUCCESS:
                self._lost(paho.error_string(sent.rc))
                return
            self._tokens[sent.mid] = entry.token
        if self._stopping:
            self._stop_when_idle()

    def _stop_when_idle(self) -> None:
        client = self._client
        if client is None or not self._limit_bytes:
            self._end()
            return
        with self._lock:
            idle = self._window.is_idle
        if idle:
            client.disconnect()
            self._flush(client)
        else:
            self._pump_soon()

    def _lost(self, reason: str) -> None:
        """Ends the connection or attempt, tells the receiver, and plans the next."""
        client, self._client = self._client, None
        connected, self._socket = self._socket, None
        if connected is not None:
            self._loop.unregister(connected)
            connected.close()
        if client is not None:
            _silence(client)
        self._tokens.clear()
        with self._lock:
            was_live, self._limit_bytes = bool(self._limit_bytes), 0
            lost_tokens = self._window.connection_lost()
        self._refuse(lost_tokens, "the connection was lost")
        self._emit(Disconnected(reason))
        if self._stopping:
            self._end()
            return
        if was_live and self._now() - self._live_since >= _STABLE_SECONDS:
            self._attempt = 0
        delay = self._backoff.delay_seconds(self._attempt, self._rng)
        self._attempt += 1
        self._loop.call_later(delay, self._connect)

    def _end(self) -> None:
        """The end of `stop`, whether all was said or the time is over."""
        if self._ended:
            return
        self._ended = True
        if self._dial is not None:
            self._dial.cancel()
        if self._client is not None:
            self._lost("stopped before everything was sent")
        with self._lock:
            left = self._window.drop_all()
        self._refuse(left, "stopped")
        self._stopped.set()

    def _refuse(self, tokens: Sequence[int], reason: str) -> None:
        for token in tokens:
            self._emit(Published(token, accepted=False, reason=reason))

    def _emit(self, event: TransportEvent) -> None:
        if self._deliver is None:
            return
        try:
            self._deliver(event)
        except Exception:  # noqa: BLE001 — through paho it would leave a half-read packet, and the stream would be lost
            _log.exception("receiver_failed client_id=%s", self._client_id)

    # paho's callbacks: they take notes, and the caller of loop_read or loop_write acts on them.

    def _on_connect(
        self,
        client: paho.Client,
        _userdata: Any,
        flags: paho.ConnectFlags,
        code: ReasonCode,
        given: Properties | None,
    ) -> None:
        if code.is_failure:
            self._fault = f"the broker refused us: {code}"
            return
        limit = min(self._max_packet_bytes, getattr(given, "MaximumPacketSize", self._max_packet_bytes))
        receive_maximum = getattr(given, "ReceiveMaximum", 65_535)
        if self._filters:  # first: nothing that we publish may be answered before we listen
            client.subscribe([(name, SubscribeOptions(qos=qos)) for name, qos in self._filters])
        with self._lock:
            self._limit_bytes = limit
            self._window.set_receive_maximum(receive_maximum)
            too_large = self._window.drop_larger(limit)
        self._live_since = self._now()
        self._emit(Connected(flags.session_present, limit, receive_maximum))
        self._refuse(too_large, "larger than the broker accepts")
        self._pump_soon()

    def _on_subscribe(
        self,
        client: paho.Client,
        _userdata: Any,
        _mid: int,
        codes: list[ReasonCode],
        _given: Properties | None,
    ) -> None:
        refused = [name for (name, _), code in zip(self._filters, codes, strict=False) if code.is_failure]
        if refused:
            self._fault = f"the broker refused the subscription to {', '.join(refused)}"
            client.disconnect()

    def _on_publish(
        self, _client: paho.Client, _userdata: Any, mid: int, code: ReasonCode, _given: Properties | None
    ) -> None:
        token = self._tokens.pop(mid, None)
        with self._lock:
            known = token is not None and self._window.settle(token)
        if token is None or not known:
            return
        success = str(code) == "Success"
        self._emit(Published(token, accepted=not code.is_failure, reason="" if success else str(code)))
        self._pump_soon()

    def _on_message(self, _client: paho.Client, _userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            _log.warning("dropped_topic_not_utf8 client_id=%s", self._client_id)
            return
        expiry = getattr(message.properties, "MessageExpiryInterval", None)
        self._emit(Received(Packet(topic, bytes(message.payload), message.qos, message.retain, expiry)))

    def _on_disconnect(
        self, _client: paho.Client, _userdata: Any, flags: paho.DisconnectFlags, code: ReasonCode, _given: Any
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._fault = f"the broker disconnected us: {code}"


@functools.lru_cache(maxsize=256)
def _publish_properties(expiry_seconds: int | None, packet_type: int) -> Properties | None:
    if expiry_seconds is None:
        return None
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]
    properties.MessageExpiryInterval = expiry_seconds
    return properties


def _silence(client: _PahoClient) -> None:
    """Lets go of a client whose connection is gone; its late callbacks must not reach us."""
    client.on_connect = client.on_subscribe = client.on_publish = client.on_message = None
    client.on_disconnect = client.on_socket_open = client.on_socket_close = None
    client.on_socket_register_write = None
