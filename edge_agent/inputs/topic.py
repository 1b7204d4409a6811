"""Windows from a topic of a local broker: the same JSON objects as on standard input, or the bytes of a `.npy` file.

Laws of the file: the broker is a local one, without access to anything but these items; a queue that is full
drops the oldest item and counts it (a sensor does not wait); what cannot be used is answered with an error, counted,
and logged at the first and at every tenfold (MQTT does not tell who published); a broker that is away is waited for.
Answers go to the door's answers and to `{topic}/answers`.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from edge_agent.inputs.item import Answering, Answers, answer_error, answer_item, read_payload
from process.logs import get_logger
from wire.errors import ConfigurationError, ShoalError, TransportError
from wire.transport import Connected, Disconnected, Packet, Received, Transport, TransportEvent

_log = get_logger("edge_agent.inputs")

ANSWERS_LEVEL: Final = "/answers"
MAX_WAITING: Final = 1024
_WAIT_SECONDS: Final = 0.5


def parse_topic_url(url: str) -> tuple[str, int, str]:
    """Host, port and topic of `mqtt://host:port/topic`.

    Raises:
        ConfigurationError: (operator) not such a URL, or a topic with wildcards.
    """
    hint = "write mqtt://host:port/the/topic"
    try:
        parts = urlsplit(url)
        host, port, topic = parts.hostname, parts.port or 1883, parts.path.removeprefix("/")
    except ValueError as error:
        raise ConfigurationError(f"{url!r} is not a URL", hint=hint) from error
    if parts.scheme != "mqtt" or not host or not topic or parts.query:
        raise ConfigurationError(f"{url!r} does not name a broker and a topic", hint=hint)
    if set(topic) & {"+", "\0"} or parts.fragment or url.endswith("#"):
        raise ConfigurationError(f"{topic!r} has a wildcard", hint="name one topic")
    return host, port, topic


class TopicInput:
    """Answers what is published to one topic.

    Args:
        transport: a client of the local broker, not started yet.
    """

    def __init__(self, transport: Transport, topic: str, answers: Answers) -> None:
        self._transport = transport
        self._topic = topic
        self._answers = answers
        self._waiting: queue.Queue[bytes] = queue.Queue(MAX_WAITING)
        self._is_connected: bool | None = None
        self.dropped_total = 0
        self.refused_total = 0

    def run(self, agent: Answering, should_stop: Callable[[], bool]) -> None:
        """Answers until `should_stop`."""
        self._transport.start(self._deliver, filters=[(self._topic, 1)])
        try:
            while not should_stop():
                try:
                    payload = self._waiting.get(timeout=_WAIT_SECONDS)
                except queue.Empty:
                    continue
                self._answer(agent, payload)
        finally:
            self._transport.stop()

    def _deliver(self, event: TransportEvent) -> None:
        match event:
            case Connected():
                self._show(True, "")
            case Disconnected():
                self._show(False, event.reason)
            case Received():
                self._queue(event.packet.payload)

    def _show(self, is_connected: bool, reason: str) -> None:
        """A change is worth a line, an attempt is not."""
        if is_connected != self._is_connected:
            self._is_connected = is_connected
            if is_connected:
                _log.info("input_connected", topic=self._topic)
            else:
                _log.warning("input_broker_away", topic=self._topic, reason=reason)

    def _queue(self, payload: bytes) -> None:
        while True:
            try:
                self._waiting.put_nowait(payload)
                return
            except queue.Full:
                self.dropped_total += 1
                if _is_worth_a_line(self.dropped_total):
                    _log.warning("input_too_fast", topic=self._topic, dropped=self.dropped_total)
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            self._waiting.get_nowait()
        except queue.Empty:
            return

    def _answer(self, agent: Answering, payload: bytes) -> None:
        name = ""
        try:
            item = read_payload(payload)
            name = item.id
            answer = answer_item(agent, item)
        except ShoalError as error:
            answer = answer_error(error, name)
            self.refused_total += 1
            if _is_worth_a_line(self.refused_total):
                _log.warning("input_refused", topic=self._topic, reason=str(error), total=self.refused_total)
        self._answers(answer)
        self._publish(answer)

    def _publish(self, answer: dict[str, Any]) -> None:
        try:
            self._transport.publish(Packet(self._topic + ANSWERS_LEVEL, json.dumps(answer).encode(), qos=0))
        except TransportError:
            # The answer has gone to the door's own answers; a local broker that is away loses only the copy.
            self.dropped_total += 1


def _is_worth_a_line(total: int) -> bool:
    """1, 10, 100, …: a sender must not fill the log."""
    return str(total).rstrip("0") == "1"
