"""A broker and its clients in one process and on one thread, for simulations and tests: same seam, same laws.

`MemoryBroker` has what the MQTT transport relies on: QoS 0 and 1, retained messages, wills, wildcards,
sessions that keep a bounded queue while their client is away, and expiry by the given clock. Laws: nothing
happens outside of `pump`; what happens in it has one order, the order of publication (the same calls give the
same deliveries); payloads are shared, never copied; a publication to an exact topic costs nothing for clients
that do not listen to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from wire.errors import BackpressureError, ConfigurationError
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
from wire.transport.gate import check_room
from wire.transport.topic_filters import check_filter, check_packet, is_wildcard, matches, publish_size_bytes

_FOREVER = float("inf")
_TOPICS_REMEMBERED = 65_536


@dataclass(slots=True)
class _Stored:
    """A packet that waits: for a client to come back, or as the retained message of its topic."""

    packet: Packet
    expires_at: float


@dataclass(slots=True, eq=False)
class _Session:
    """What the broker knows of one client id."""

    client_id: str
    expiry_seconds: float
    filters: dict[str, int] = field(default_factory=dict)
    waiting: deque[_Stored] = field(default_factory=deque)
    client: MemoryTransport | None = None
    will: Packet | None = None
    ends_at: float = _FOREVER


@dataclass(slots=True)
class _Publication:
    sender: MemoryTransport | None
    connection: int
    token: int
    packet: Packet


class MemoryBroker:
    """An MQTT-like broker without a network.

    Args:
        clock: decides expiry and when a client that was cut comes back.
        max_packet_bytes: told to clients at connection.
        receive_maximum: told to clients at connection.
        session_queue_packets: what a session keeps for a client that is away; the newest are dropped above
            it, without a word, as real brokers do.
    """

    def __init__(
        self,
        clock: Monotonic,
        *,
        max_packet_bytes: int = 131_072,
        receive_maximum: int = 65_535,
        session_queue_packets: int = 1_000,
    ) -> None:
        self._clock = clock
        self._session_queue_packets = session_queue_packets
        self.max_packet_bytes = max_packet_bytes
        self.receive_maximum = receive_maximum
        self.dropped_total = 0
        self._publications: deque[_Publication] = deque()
        self._connecting: dict[MemoryTransport, float] = {}
        self._sessions: dict[str, _Session] = {}
        self._exact: dict[str, dict[str, _Session]] = {}
        self._wild: dict[str, dict[str, _Session]] = {}
        self._wild_of_topic: dict[str, tuple[str, ...]] = {}
        self._retained: dict[str, _Stored] = {}
        self._retained_of_filter: dict[str, list[str]] = {}
        self._delivered = 0

    def pump(self) -> int:
        """Connects who waits, then routes and delivers everything until nothing is left, oldest first.

        Receivers may publish from within `deliver`; that is part of the same pump.

        Returns:
            The number of packets delivered.
        """
        before = self._delivered
        self._connect_due()
        while self._publications:
            publication = self._publications.popleft()
            sender = publication.sender
            if sender is None:
                self._route(publication.packet)
            elif sender.connection == publication.connection:  # else it was cut off under way
                self._route(publication.packet)
                sender.acknowledged(publication.token)
            if not self._publications:
                self._connect_due()
        return self._delivered - before

    def next_due(self) -> float | None:
        """When, by the clock, a client that was cut comes back at the earliest, or None."""
        return min(self._connecting.values(), default=None)

    def is_connected(self, client_id: str) -> bool:
        """Whether a client is there now."""
        session = self._sessions.get(client_id)
        return session is not None and session.client is not None

    def cut(self, client_id: str, *, for_seconds: float = 0.0, reason: str = "cut") -> None:
        """Ends a connection without a goodbye; the will goes out, the client is back after `for_seconds`."""
        session = self._sessions.get(client_id)
        if session is not None and session.client is not None:
            session.client.drop(reason, for_seconds=for_seconds)

    def forget_everything(self, *, for_seconds: float = 0.0) -> None:
        """What a broker does whose disk was wiped: sessions, queues, retained messages and subscriptions are gone, and
        so are publications that it has acknowledged; its clients are cut off and are back after `for_seconds`.
        """
        for client in [session.client for session in self._sessions.values() if session.client is not None]:
            client.drop("the broker was lost", for_seconds=for_seconds)
        for index in (self._sessions, self._exact, self._wild, self._wild_of_topic, self._retained):
            index.clear()
        self._retained_of_filter.clear()
        self._publications.clear()

    # What a MemoryTransport calls.

    def connect_in(self, client: MemoryTransport, delay_seconds: float) -> None:
        """Plans a connection."""
        self._connecting[client] = self._clock.monotonic() + delay_seconds

    def submit(self, sender: MemoryTransport | None, token: int, packet: Packet) -> None:
        """Queues a publication."""
        connection = 0 if sender is None else sender.connection
        self._publications.append(_Publication(sender, connection, token, packet))

    def leave(self, client: MemoryTransport, *, with_will: bool) -> None:
        """Ends a connection; the session stays until it expires."""
        self._connecting.pop(client, None)
        session = self._sessions.get(client.client_id)
        if session is None or session.client is not client:
            return
        session.client = None
        session.ends_at = self._clock.monotonic() + session.expiry_seconds
        if with_will and session.will is not None:
            self.submit(None, 0, session.will)
        session.will = None
        if session.expiry_seconds <= 0:
            self._forget(session)

    def _connect_due(self) -> None:
        if not self._connecting:
            return
        now = self._clock.monotonic()
        ready = sorted((due, order) for order, due in enumerate(self._connecting.values()) if due <= now)
        waiting = list(self._connecting)
        for client in [waiting[order] for _, order in ready]:
            del self._connecting[client]
            self._connect(client, now)

    def _connect(self, client: MemoryTransport, now: float) -> None:
        session = self._sessions.get(client.client_id)
        if session is not None and session.client is not None:
            session.client.drop("session taken over", for_seconds=_FOREVER)  # two that fight would never end
        if session is not None and (client.clean_start or session.ends_at <= now):
            self._forget(session)
            session = None
        present = session is not None
        if session is None:
            session = _Session(client.client_id, client.session_expiry_seconds)
            self._sessions[client.client_id] = session
        session.client, session.will = client, client.will
        session.expiry_seconds, session.ends_at = client.session_expiry_seconds, _FOREVER
        self._subscribe(session, client.filters)
        client.accepted(Connected(present, self.max_packet_bytes, self.receive_maximum))
        while session.waiting and session.client is client:
            stored = session.waiting.popleft()
            if stored.expires_at > now:
                self._hand_over(client, Received(stored.packet))
        if session.client is client:
            self._send_retained(client, now)

    def _subscribe(self, session: _Session, filters: Sequence[tuple[str, int]]) -> None:
        for topic_filter, qos in filters:
            session.filters[topic_filter] = qos
            index = self._wild if is_wildcard(topic_filter) else self._exact
            if index is self._wild and topic_filter not in index:
                self._wild_of_topic.clear()
            index.setdefault(topic_filter, {})[session.client_id] = session

    def _send_retained(self, client: MemoryTransport, now: float) -> None:
        for topic in self._retained_topics(client.filters):
            stored = self._retained[topic]
            if stored.expires_at <= now:
                self._retain(Packet(topic, b""), now)
            else:
                self._hand_over(client, Received(stored.packet))

    def _retained_topics(self, filters: Sequence[tuple[str, int]]) -> list[str]:
        topics = dict.fromkeys(
            name for name, _ in filters if not is_wildcard(name) and name in self._retained
        )
        for name, _ in filters:
            if is_wildcard(name):
                topics.update(dict.fromkeys(self._retained_under(name)))
        return list(topics)

    def _retained_under(self, topic_filter: str) -> list[str]:
        # Remembered, because a thousand devices ask with the same filter, one after the other.
        found = self._retained_of_filter.get(topic_filter)
        if found is None:
            found = [topic for topic in self._retained if matches(topic_filter, topic)]
            self._retained_of_filter[topic_filter] = found
        return found

    def _forget(self, session: _Session) -> None:
        self._sessions.pop(session.client_id, None)
        for topic_filter in session.filters:
            index = self._wild if is_wildcard(topic_filter) else self._exact
            listeners = index.get(topic_filter, {})
            listeners.pop(session.client_id, None)
            if not listeners and index.pop(topic_filter, None) is not None and index is self._wild:
                self._wild_of_topic.clear()

    def _route(self, packet: Packet) -> None:
        now = self._clock.monotonic()
        expires_at = _FOREVER if packet.expiry_seconds is None else now + packet.expiry_seconds
        if packet.retain:
            self._retain(packet, expires_at)
            packet = replace(packet, retain=False)
        received = Received(packet)
        at_most_once = received if packet.qos == 0 else Received(replace(packet, qos=0))
        for session, qos in self._listeners(packet.topic):
            if session.client is not None:
                self._hand_over(session.client, received if qos else at_most_once)
            elif session.ends_at <= now:
                self._forget(session)
            elif qos and packet.qos:
                self._keep(session, _Stored(packet, expires_at))

    def _retain(self, packet: Packet, expires_at: float) -> None:
        """Sets the retained message of a topic; an empty payload clears it."""
        known = packet.topic in self._retained
        if packet.payload:
            self._retained[packet.topic] = _Stored(packet, expires_at)
        elif known:
            del self._retained[packet.topic]
        if known != bool(packet.payload):
            self._retained_of_filter.clear()

    def _keep(self, session: _Session, stored: _Stored) -> None:
        if len(session.waiting) >= self._session_queue_packets:
            self.dropped_total += 1
        else:
            session.waiting.append(stored)

    def _listeners(self, topic: str) -> Iterator[tuple[_Session, int]]:
        """Sessions with a matching filter, each once, with the highest QoS that it asked for."""
        groups = [(topic, self._exact[topic])] if topic in self._exact else []
        groups += [(name, self._wild[name]) for name in self._matching_wild(topic)]
        if len(groups) == 1:
            name, listeners = groups[0]
            for session in list(listeners.values()):
                yield session, session.filters[name]
            return
        merged: dict[str, tuple[_Session, int]] = {}
        for name, listeners in groups:
            for client_id, session in listeners.items():
                highest = max(session.filters[name], merged.get(client_id, (session, 0))[1])
                merged[client_id] = (session, highest)
        yield from merged.values()

    def _matching_wild(self, topic: str) -> tuple[str, ...]:
        found = self._wild_of_topic.get(topic)
        if found is None:
            if len(self._wild_of_topic) >= _TOPICS_REMEMBERED:
                self._wild_of_topic.clear()
            found = tuple(name for name in self._wild if matches(name, topic))
            self._wild_of_topic[topic] = found
        return found

    def _hand_over(self, client: MemoryTransport, received: Received) -> None:
        self._delivered += 1
        client.receive(received)


class MemoryTransport:
    """A client of a `MemoryBroker`. Not for use from several threads.

    Args:
        client_id: stable for the life of the session.
        clean_start: forget the session at every connection.
        session_expiry_seconds: how long the broker keeps the session while we are away.
        queue_packets: publications that wait for the next pump, at most.
    """

    def __init__(
        self,
        broker: MemoryBroker,
        client_id: str,
        *,
        clean_start: bool = False,
        session_expiry_seconds: float = 7 * 86_400,
        queue_packets: int = 1_024,
    ) -> None:
        self.client_id = client_id
        self.clean_start = clean_start
        self.session_expiry_seconds = session_expiry_seconds
        self.filters: tuple[tuple[str, int], ...] = ()
        self.will: Packet | None = None
        self.connection = 0
        self._broker = broker
        self._queue_packets = queue_packets
        self._deliver: Deliver | None = None
        self._limit_bytes = 0
        self._unacknowledged: dict[int, Packet] = {}
        self._last_token = 0
        self._stopped = False

    def start(
        self, deliver: Deliver, *, filters: Sequence[tuple[str, int]], will: Packet | None = None
    ) -> None:
        """Connects at the next pump.

        Raises:
            ConfigurationError: (us) a filter or will that no broker takes, or a second start.
        """
        for topic_filter, _ in filters:
            check_filter(topic_filter)
        if will is not None:
            check_packet(will)
        if self._deliver is not None:
            raise ConfigurationError(f"transport {self.client_id!r} starts only once")
        self._deliver = deliver
        self.filters = tuple(filters)
        self.will = will
        self._broker.connect_in(self, 0.0)

    def publish(self, packet: Packet) -> int:
        """Queues one publication for the next pump and returns its token.

        Raises:
            BackpressureError: the queue is full, or there is no connection.
            OversizeError: larger than the broker accepts.
            ConfigurationError: (us) a topic or QoS that cannot be published.
        """
        check_packet(packet)
        check_room(packet, self._limit_bytes)
        if len(self._unacknowledged) >= self._queue_packets:
            raise BackpressureError(
                "the send queue is full",
                hint="publish again after a Published event",
                queued=len(self._unacknowledged),
            )
        self._last_token += 1
        self._unacknowledged[self._last_token] = packet
        self._broker.submit(self, self._last_token, packet)
        return self._last_token

    def drop(self, reason: str = "dropped on purpose", *, for_seconds: float = 0.0) -> None:
        """Cuts the connection as a broken network would; comes back after `for_seconds` (infinite: never).

        Publications that the broker has not routed yet travel again after that (QoS 1) or are lost (QoS 0).
        """
        if not self._limit_bytes:
            return
        self._limit_bytes = 0
        self.connection += 1
        self._broker.leave(self, with_will=True)
        for token in [token for token, packet in self._unacknowledged.items() if packet.qos == 0]:
            del self._unacknowledged[token]
            self._emit(Published(token, accepted=False, reason="the connection was lost"))
        self._emit(Disconnected(reason))
        if for_seconds < _FOREVER:
            self._broker.connect_in(self, for_seconds)

    def stop(self, last_words: Packet | None = None) -> None:
        """Leaves without a will; what was published before still travels, and `last_words` after it."""
        if self._stopped:
            return
        self._stopped = True
        if last_words is not None and publish_size_bytes(last_words) <= self._limit_bytes:
            self._broker.submit(None, 0, last_words)
        self._limit_bytes = 0
        self._broker.leave(self, with_will=False)

    # What the broker calls, from `pump`.

    def accepted(self, event: Connected) -> None:
        """The broker let us in: publications of an earlier connection travel again."""
        self._limit_bytes = event.max_packet_bytes
        for token, packet in self._unacknowledged.items():
            self._broker.submit(self, token, packet)
        self._emit(event)

    def acknowledged(self, token: int) -> None:
        """The broker routed a publication of ours."""
        if self._unacknowledged.pop(token, None) is not None:
            self._emit(Published(token, accepted=True))

    def receive(self, event: Received) -> None:
        """A publication for us."""
        self._emit(event)

    def _emit(self, event: TransportEvent) -> None:
        if self._deliver is not None and not self._stopped:
            self._deliver(event)
