"""`shoal-edge run`: an agent, its inputs on their own threads, and signals.

Laws of the file: answers are lines of JSON on standard output, one at a time; a door that breaks is logged
and the agent goes on; SIGTERM and SIGINT end the agent politely, and so does an output that nobody reads; what
`--once` could not use is in the exit code too.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol

from edge_agent.agent import Agent
from edge_agent.background import SWITCH_SECONDS
from edge_agent.freed_memory import share_one_arena
from edge_agent.inputs.files import FileInput, check_path
from edge_agent.inputs.item import Answering, Answers
from edge_agent.inputs.lines import LineInput
from edge_agent.inputs.topic import TopicInput, parse_topic_url
from edge_agent.settings import EdgeSettings
from edge_agent.store.storage import Database
from edge_agent.unloaded import leave_unloaded
from process.logs import get_logger
from process.service_manager import ServiceManager
from wire.errors import ConfigurationError, DataError

_log = get_logger("edge_agent.running")
_WAIT_SECONDS = 1.0
_STREAMS: Final = ("-", "stdin")
_TOPIC: Final = "mqtt://"


class Input(Protocol):
    """A door."""

    def run(self, agent: Answering, should_stop: Callable[[], bool]) -> None:
        """Answers until its source ends or `should_stop`."""
        ...


class FactBookmark:
    """Where a folder input stopped, as a fact of the agent's database."""

    def __init__(self, database: Database, path: Path) -> None:
        self._database = database
        self._name = f"input:{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}"

    def read(self) -> str:
        return str(self._database.fact(self._name) or "")

    def write(self, mark: str) -> None:
        self._database.set_fact(self._name, mark, durable=False)


class AnswerWriter:
    """Lines of JSON on standard output, at once and one at a time, from any thread.

    Args:
        on_broken: called when the output cannot be written any more.
    """

    def __init__(self, on_broken: Callable[[], None]) -> None:
        self._on_broken = on_broken
        self._lock = threading.Lock()
        self.answers_total = 0
        self.refusals_total = 0
        self.failure: OSError | None = None

    def __call__(self, answer: dict[str, Any]) -> None:
        line = json.dumps(answer)  # ASCII only: no terminal's or file system's encoding can refuse it
        with self._lock:
            self.answers_total += 1
            self.refusals_total += "error" in answer
            try:
                print(line, flush=True)
            except OSError as error:
                self.failure = error
                self._on_broken()


def check_source(source: str, *, once: bool) -> None:
    """Looks at a `--input` before a token is used or a database opened for it.

    Raises:
        ConfigurationError: (operator) not a door that we know, or one that is not there.
    """
    if source in _STREAMS:
        return
    if source.startswith(_TOPIC):
        parse_topic_url(source)
        if once:
            raise ConfigurationError(
                f"{source} never ends, and --once waits for its end", hint="leave --once away"
            )
    elif "://" in source:
        raise ConfigurationError(
            f"no input of this kind: {source}", hint="-, a file, a folder, or mqtt://host:port/topic"
        )
    else:
        check_path(Path(source))


def open_input(source: str, agent: Agent, answers: Answers, *, once: bool = False) -> Input:
    """The door that a `--input` names.

    Raises:
        ConfigurationError: (operator) as `check_source`.
    """
    check_source(source, once=once)
    if source in _STREAMS:
        # Not sys.stdin: a thread that reads it when the interpreter ends would abort the process.
        return LineInput(open(0, "rb", closefd=False), answers)
    if source.startswith(_TOPIC):
        host, port, topic = parse_topic_url(source)
        from wire.transport.mqtt import MqttTransport

        name = f"shoal-input-{agent.identity.device}"
        transport = MqttTransport(name, host, port, clean_start=True, session_expiry_seconds=0)
        return TopicInput(transport, topic, answers)
    path = Path(source)
    bookmark = FactBookmark(agent.parts.database, path)
    return FileInput(path, answers, input_shape=lambda: agent.input_shape, bookmark=bookmark, once=once)


def run_agent(folder: Path, settings: EdgeSettings, sources: Sequence[str], *, once: bool) -> int:
    """Runs until a signal, or until all inputs have ended with `once`; returns the exit code.

    Raises:
        ConfigurationError, TrustError, StorageError: the agent cannot start.
        DataError: with `once`, something that came in could not be used; its answer says why.
        OSError: standard output cannot be written any more.
    """
    share_one_arena()
    sys.setswitchinterval(SWITCH_SECONDS)
    # The MQTT client imports it for proxies, which it would need another package to use: 1.5 MiB.
    leave_unloaded("urllib.request")
    agent = Agent.from_folder(folder, settings, service_manager=ServiceManager.of(os.environ))
    ended = threading.Event()
    interrupts: list[int] = []

    def end() -> None:
        ended.set()
        agent.wake()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        interrupts.append(number)
        end()

    answers = AnswerWriter(end)
    inputs = [open_input(source, agent, answers, once=once) for source in sources]
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, on_signal)
    agent.start()
    threads = [_serve(door, agent, ended.is_set) for door in inputs]
    if once:
        threading.Thread(target=_end_after, args=(threads, end), daemon=True).start()
    try:
        agent.run_forever(ended.is_set)
    finally:
        ended.set()
        agent.stop()
    if signal.SIGINT in interrupts:
        raise KeyboardInterrupt
    _settle(answers, once=once)
    return 0


def _settle(answers: AnswerWriter, *, once: bool) -> None:
    """What the answers say about the whole."""
    if answers.failure is not None:
        raise answers.failure
    if once and answers.refusals_total:
        raise DataError(
            f"{answers.refusals_total} of {answers.answers_total} could not be used",
            hint="the answer of each of them on standard output says why",
        )


def _serve(door: Input, agent: Agent, should_stop: Callable[[], bool]) -> threading.Thread:
    def run() -> None:
        while not agent.wait_for_model(_WAIT_SECONDS):
            if should_stop():
                return
        try:
            door.run(agent, should_stop)
        except Exception:  # noqa: BLE001  the outermost loop of this thread: the agent goes on without the door
            _log.exception("input_failed", input=type(door).__name__)

    thread = threading.Thread(target=run, name="shoal-input", daemon=True)
    thread.start()
    return thread


def _end_after(threads: Sequence[threading.Thread], end: Callable[[], None]) -> None:
    for thread in threads:
        thread.join()
    end()
