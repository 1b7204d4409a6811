"""MQTT 5 behind the transport seam; the only file that imports paho.

paho's traps, and what is done about each: its queue is unlimited (`gate.py` and `window.py` are the queue),
its errors are return codes (every one ends the connection with a reason), an exception in a callback kills
its thread (callbacks only take notes and enqueue; a receiver that raises is logged), its threads and `select`
do not scale (`selector.py` drives it), its connect blocks (`dial.py` connects), it forgets CONNACK's limits
and then reconnects for ever with the packet that was too large (size and window are ours), its reconnect has
no jitter (every connection is a new paho client, so none of its state outlives one).

Laws: the caller never blocks, except in `stop`, which is bounded; paho is touched on the loop's thread only;
never a clean start for a session that shall persist. Source: docs/protocol.md, clause 10; MQTT 5.0.
"""

from __future__ import annotations

import functools
import logging
import random
import selectors
import ssl
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from wire.backoff import Backoff
from wire.errors import ConfigurationError
from wire.traffic import Traffic
from wire.transport import Deliver, Monotonic, Packet
from wire.transport.dial import CONNECT_TIMEOUT_SECONDS, BoundedSocket
from wire.transport.gate import SendGate
from wire.transport.keeper import Keeper
from wire.transport.selector import SelectorLoop
from wire.transport.topic_filters import check_filter, check_packet, matches
from wire.transport.window import SendWindow

_log = logging.getLogger("wire.transport.mqtt")

DEFAULT_MAX_PACKET_BYTES = 131_072  # hosted brokers stop at 128 KB
_RECEIVE_MAXIMUM = 64  # of what the broker may send us without our acknowledgement
_EARLY_PACKETS = 1_000  # received between CONNACK and SUBACK
_EARLY_BYTES = 32 * 1_048_576  # of those
# What a broker that has too much to do says (MQTT 5, 2.4): server unavailable, server busy, quota exceeded, connection
# rate exceeded. It names no time, so the least wait is ours; it is doubled with every refusal, like any other.
_BUSY_CODES = frozenset({0x88, 0x89, 0x97, 0x9F})
_BUSY_SECONDS = 15.0
_READS_PER_TURN = 64  # one busy client must not starve the others of its loop


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
        self._terms = _Terms(
            client_id, (host, port), keepalive_seconds, clean_start, session_expiry_seconds, max_packet_bytes
        )
        self._started = False
        self._keeper = Keeper(
            (host, port),
            tls,
            loop,
            SendGate(SendWindow(inflight_window, queue_packets, queue_bytes)),
            backoff=backoff if backoff is not None else Backoff(),
            rng=rng if rng is not None else random.Random(),
            now=clock.monotonic if clock is not None else time.monotonic,
            max_packet_bytes=max_packet_bytes,
            stuck_after_seconds=4.0 * keepalive_seconds,
            stop_timeout_seconds=stop_timeout_seconds,
        )

    def start(
        self, deliver: Deliver, *, filters: Sequence[tuple[str, int]], will: Packet | None = None
    ) -> None:
        """Connects, keeps connected, subscribes to (topic filter, qos) at every connection.

        `deliver` is called on the loop's thread and may only enqueue. A failed attempt is a `Disconnected`
        too.
        Subscribing again also where the session was kept brings the retained messages anew: a broker that
            drops
        from full queues drops announcements as well.

        Raises:
            ConfigurationError: (us) a filter or will that no broker takes, or a second start.
        """
        for topic_filter, _ in filters:
            check_filter(topic_filter)
        if will is not None:
            check_packet(will)
        if self._started:
            raise ConfigurationError(f"transport {self._terms.client_id!r} starts only once")
        self._started = True
        terms = replace(self._terms, filters=tuple(filters), will=will)
        self._keeper.start(deliver, lambda connected: _Connection(self._keeper, connected, terms))

    def publish(self, packet: Packet) -> int:
        """Queues one publication and returns its token. Safe from any thread.

        Raises:
            BackpressureError: window and queue are full, or there is no connection.
            OversizeError: larger than the broker said it accepts.
            ConfigurationError: (us) a topic or QoS that cannot be published.
        """
        return self._keeper.publish(packet)

    def drop(self, reason: str = "dropped on purpose") -> None:
        """Cuts the connection as a broken network would: the will goes out, then the transport reconnects."""
        self._keeper.drop(reason)

    def rejoin(self, reason: str) -> None:
        """Leaves with a clean DISCONNECT (no will, the session stays) and connects again: what `tls` loaded since
        counts from then on. Nothing happens without a connection: the next one is new anyway.
        """
        self._keeper.rejoin(reason)

    def spread(self, seconds: float) -> None:
        """The fleet shall come back over so many seconds after a connection is lost (0: as the back-off says), and
        when it starts. Safe from any thread; before `start`, too.
        """
        self._keeper.spread(seconds)

    def mute(self, filters: Collection[str]) -> None:
        """Of the topic filters of `start`, those that are not listened to for now, in this session and any that the
        broker kept: what is published there costs the link nothing. Empty for none. Safe from any thread; before
        `start`, too.
        """
        self._keeper.mute(frozenset(filters))

    def traffic(self) -> Traffic | None:
        """What all connections of this client cost the link so far; None where the system does not say."""
        return self._keeper.meter.total()

    def pause(self, is_paused: bool) -> None:
        """Reads nothing more, or reads again: the broker then keeps what is for us, and slows down who sends it, as
        long as its limits and our keep-alive (which goes on) allow. What was read already is still delivered. Safe
        from any thread; a connection that comes meanwhile is paused as soon as it stands.
        """
        self._keeper.pause(is_paused)

    def use_tls(self, tls: ssl.SSLContext) -> None:
        """Another context from the next connection on; `rejoin` makes that now. Safe from any thread."""
        self._keeper.use_tls(tls)

    def stop(self, last_words: Packet | None = None) -> None:
        """Sends what is queued and `last_words` if it can, disconnects cleanly and frees the thread.

        Takes at most `stop_timeout_seconds`; when that is not enough the will speaks instead. Safe to call
        twice. Called from `deliver`, it returns at once and the rest happens behind it.
        """
        self._keeper.stop(last_words)


@dataclass(frozen=True, slots=True)
class _Terms:
    """What every connection of a transport is opened with."""

    client_id: str
    address: tuple[str, int]
    keepalive_seconds: int
    clean_start: bool
    session_expiry_seconds: int
    max_packet_bytes: int
    filters: tuple[tuple[str, int], ...] = ()
    will: Packet | None = None

    def connect_properties(self) -> Properties:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self.session_expiry_seconds
        properties.MaximumPacketSize = self.max_packet_bytes
        properties.ReceiveMaximum = _RECEIVE_MAXIMUM
        return properties


class _PahoClient(paho.Client):
    """paho on a socket that was connected for it (contract-tested: `connect` takes what `_create_socket`
    gives).
    """

    def __init__(self, client_id: str, given: BoundedSocket) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5)
        self._given = given

    def _create_socket(self) -> BoundedSocket:
        return self._given

    def ping(self) -> None:
        """Says that we live, whether or not anything is read (contract-tested)."""
        self._send_pingreq()


class _Connection:
    """One connection: a paho client on one socket, from CONNECT to its end. Reports to its keeper."""

    def __init__(self, owner: Keeper, connected: BoundedSocket, terms: _Terms) -> None:
        self._owner = owner
        self._loop = loop = owner.loop
        self._socket = connected
        self._terms = terms
        self._client = client = _PahoClient(terms.client_id, connected)
        self._is_accepted = False
        self._welcome = (False, terms.max_packet_bytes, 65_535)
        self._early: list[Packet] = []
        self._early_bytes = 0
        self._asked_for: list[tuple[str, int]] = []
        self._muted: frozenset[str] = frozenset()
        self._withheld: dict[str, Packet] = {}
        self._is_closed = self._is_paused = False
        self._watched = selectors.EVENT_READ
        self._fault = ""
        self._asked_seconds = 0.0
        client.max_inflight_messages_set(0)  # none of paho's: the window is ours
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_disconnect = self._on_disconnect
        client.on_socket_open = lambda *_: loop.register(connected, selectors.EVENT_READ, self._ready)
        client.on_socket_close = lambda *_: loop.unregister(connected)
        client.on_socket_register_write = lambda *_: loop.call_soon(self._flush)
        will = terms.will
        if will is not None:
            properties = _publish_properties(will.expiry_seconds, PacketTypes.WILLMESSAGE)
            client.will_set(will.topic, will.payload, will.qos, will.retain, properties)

    def open(self) -> None:
        """Sends CONNECT."""
        self._client.connect(
            *self._terms.address,
            self._terms.keepalive_seconds,
            clean_start=self._terms.clean_start,
            properties=self._terms.connect_properties(),
        )
        self._loop.call_later(CONNECT_TIMEOUT_SECONDS, self._check_accepted)
        self._loop.call_later(self._care_seconds(), self._care)

    def send(self, packet: Packet) -> int | None:
        """Hands a publication to paho; returns its packet identifier, or None when paho does not take it."""
        properties = _publish_properties(packet.expiry_seconds, PacketTypes.PUBLISH)
        sent = self._client.publish(packet.topic, packet.payload, packet.qos, packet.retain, properties)
        return sent.mid if sent.rc == paho.MQTT_ERR_SUCCESS else None

    def mute(self, names: frozenset[str]) -> None:
        """Subscribes and unsubscribes; what is listened to anew brings its retained messages."""
        if self._is_accepted and names != self._muted and not self._is_closed:
            self._listen(self._client, names)
            self._flush()

    def say_goodbye(self, reason: str) -> None:
        """Sends DISCONNECT; `lost` follows when it is written."""
        if not self._fault:
            self._fault = reason
            self._client.disconnect()
            self._flush()

    def close(self) -> None:
        """Closes the socket; nothing is reported any more."""
        self._is_closed = True
        self._loop.unregister(self._socket)
        self._socket.close()
        client = self._client
        client.on_connect = client.on_subscribe = client.on_publish = client.on_message = None
        client.on_disconnect = client.on_socket_open = client.on_socket_close = None
        client.on_socket_register_write = None

    def pause(self, is_paused: bool) -> None:
        """Reads nothing more, or reads again."""
        self._is_paused = is_paused
        self._ready(selectors.EVENT_READ)

    def _ready(self, events: int) -> None:
        if self._is_closed:
            return
        if events & selectors.EVENT_READ and not self._is_paused:
            for _ in range(_READS_PER_TURN):
                if self._client.loop_read() != paho.MQTT_ERR_SUCCESS or self._is_closed:
                    break
                if self._is_paused:
                    break
                if self._client.socket() is None or not self._socket.pending():
                    break
            else:
                self._loop.call_soon(lambda: self._ready(selectors.EVENT_READ))
        self._flush()

    def _flush(self) -> None:
        """Writes what the socket takes, and waits for writability only when something is left."""
        if self._is_closed:
            return
        client = self._client
        if client.socket() is not None and client.want_write():
            client.loop_write()
        if client.socket() is None:
            reason = self._fault or self._socket.fault or "the broker closed the connection"
            self._owner.lost(reason, self._asked_seconds)
            return
        reads = 0 if self._is_paused else selectors.EVENT_READ
        self._watch(reads | (selectors.EVENT_WRITE if client.want_write() else 0))

    def _watch(self, events: int) -> None:
        """What the loop waits for; nothing at all is no registration."""
        if self._watched and events:
            self._loop.modify(self._socket, events, self._ready)
        elif events:
            self._loop.register(self._socket, events, self._ready)
        elif self._watched:
            self._loop.unregister(self._socket)
        self._watched = events

    def _ready_to_work(self) -> None:
        """We are accepted and we listen: nothing that is published from now on can be missed."""
        if self._is_accepted:
            return
        self._is_accepted = True
        self._owner.accepted(*self._welcome)
        self.mute(self._owner.muted)  # what changed since we subscribed
        early, self._early = self._early, []
        for packet in early:
            self._owner.received(packet)

    def _check_accepted(self) -> None:
        if not self._is_closed and not self._is_accepted:
            self._owner.lost("the broker did not answer CONNECT or SUBSCRIBE")

    def _care_seconds(self) -> float:
        # The broker may have asked for another one (Server Keep Alive), which paho took.
        return max(0.25, min(self._terms.keepalive_seconds, self._client.keepalive) / 4)

    def _care(self) -> None:
        """Pings, and ends a connection on which nothing is acknowledged any more."""
        if self._is_closed:
            return
        if self._owner.is_stuck():
            self._owner.lost("the broker no longer acknowledges")
            return
        if self._is_paused:
            self._client.ping()  # its answer is not read, so paho must not wait for one
        elif self._client.loop_misc() != paho.MQTT_ERR_SUCCESS:
            self._fault = self._fault or "the broker no longer answers"
        self._loop.call_later(self._care_seconds(), self._care)
        self._flush()

    # paho's callbacks: they take notes, and whoever called loop_read or loop_write acts on them.

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
            self._note_busy(code)
            return
        own_limit = self._terms.max_packet_bytes
        limit = min(own_limit, getattr(given, "MaximumPacketSize", own_limit))
        self._welcome = (flags.session_present, limit, getattr(given, "ReceiveMaximum", 65_535))
        self._listen(client, self._owner.muted)
        if not self._asked_for:
            self._ready_to_work()

    def _listen(self, client: paho.Client, muted: frozenset[str]) -> None:
        """Subscribes to all but `muted`. A session that was kept may still listen to those. The newest that came of one
        all the same is heard when it is listened to again."""
        self._muted = muted
        unwanted = [name for name, _ in self._terms.filters if name in muted]
        self._asked_for = [(name, qos) for name, qos in self._terms.filters if name not in muted]
        if unwanted:
            client.unsubscribe(unwanted)
        if self._asked_for:
            client.subscribe([(name, SubscribeOptions(qos=qos)) for name, qos in self._asked_for])
        for name in self._withheld.keys() - muted:
            self._owner.received(self._withheld.pop(name))

    def _on_subscribe(
        self,
        client: paho.Client,
        _userdata: Any,
        _mid: int,
        codes: list[ReasonCode],
        _given: Properties | None,
    ) -> None:
        pairs = zip(self._asked_for, codes, strict=False)
        refused = [f"{name} ({code})" for (name, _), code in pairs if code.is_failure]
        if refused:
            self._fault = f"the broker refused the subscription to {', '.join(refused)}"
            client.disconnect()
        else:
            self._ready_to_work()

    def _on_publish(
        self, _client: paho.Client, _userdata: Any, mid: int, code: ReasonCode, _given: Properties | None
    ) -> None:
        text = str(code)
        self._owner.published(mid, text if code.is_failure else "", "" if text == "Success" else text)

    def _on_message(self, client: paho.Client, _userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            _log.warning("topic_not_utf8_dropped", extra={"fields": {"client_id": self._terms.client_id}})
            return
        expiry = getattr(message.properties, "MessageExpiryInterval", None)
        packet = Packet(topic, bytes(message.payload), message.qos, message.retain, expiry)
        muted = self._muting(topic)
        if muted is not None:
            # The embedded broker goes on sending after UNSUBSCRIBE, and then brings nothing anew.
            self._withheld[muted] = packet
        elif self._is_accepted:
            self._owner.received(packet)
        elif len(self._early) < _EARLY_PACKETS and self._early_bytes < _EARLY_BYTES:
            self._early.append(packet)  # a kept session speaks before SUBACK
            self._early_bytes += len(packet.payload)
        else:
            self._fault = "the broker sends without answering SUBSCRIBE"
            client.disconnect()

    def _muting(self, topic: str) -> str | None:
        """The muted filter that a topic falls under, where no other wants it."""
        if any(matches(name, topic) for name, _ in self._asked_for):
            return None
        return next((name for name in self._muted if matches(name, topic)), None)

    def _on_disconnect(
        self,
        _client: paho.Client,
        _userdata: Any,
        flags: paho.DisconnectFlags,
        code: ReasonCode,
        _given: Properties | None,
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._fault = f"the broker disconnected us: {code}"
            self._note_busy(code)

    def _note_busy(self, code: ReasonCode) -> None:
        if code.value in _BUSY_CODES:
            self._asked_seconds = _BUSY_SECONDS


@functools.lru_cache(maxsize=256)
def _publish_properties(expiry_seconds: int | None, packet_type: int) -> Properties | None:
    if expiry_seconds is None:
        return None
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]
    properties.MessageExpiryInterval = expiry_seconds
    return properties
