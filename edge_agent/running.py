"""`shoal-edge run`: an agent, its inputs on their own threads, and signals.

Laws of the file: answers are lines of JSON on standard output, one at a time; a door that breaks is logged
and the agent goes on; SIGTERM and SIGINT end the agent politely.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from edge_agent.agent import Agent
from edge_agent.freed_memory import share_one_arena
from edge_agent.inputs.files import FileInput
from edge_agent.inputs.item import Answering, Answers
from edge_agent.inputs.lines import LineInput
from edge_agent.inputs.topic import TopicInput, parse_topic_url
from edge_agent.settings import EdgeSettings
from edge_agent.storage import Database
from process.logs import get_logger
from wire.errors import ConfigurationError

_log = get_logger("edge_agent.running")
_WAIT_SECONDS = 1.0


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


def open_input(source: str, agent: Agent, answers: Answers) -> Input:
    """The door that a `--input` names.

    Raises:
        ConfigurationError: (operator) not a door that we know, or one that is not there.
    """
    if source in ("-", "stdin"):
        # Not sys.stdin: a thread that reads it when the interpreter ends would abort the process.
        return LineInput(open(0, "rb", closefd=False), answers)
    if source.startswith("mqtt://"):
        host, port, topic = parse_topic_url(source)
        from wire.transport.mqtt import MqttTransport

        name = f"shoal-input-{agent.identity.device}"
        transport = MqttTransport(name, host, port, clean_start=True, session_expiry_seconds=0)
        return TopicInput(transport, topic, answers)
    if "://" in source:
        raise ConfigurationError(
            f"no input of this kind: {source}", hint="-, a file, a folder, or mqtt://host:port/topic"
        )
    path = Path(source)
    bookmark = FactBookmark(agent.parts.database, path)
    return FileInput(path, answers, input_shape=lambda: agent.input_shape, bookmark=bookmark)


def run_agent(folder: Path, settings: EdgeSettings, sources: Sequence[str], *, once: bool) -> int:
    """Runs until a signal, or until all inputs have ended with `once`; returns the exit code.

    Raises:
        ConfigurationError, TrustError, StorageError: the agent cannot start.
    """
    share_one_arena()
    agent = Agent.from_folder(folder, settings)
    ended = threading.Event()
    inputs = [open_input(source, agent, print_answer) for source in sources]

    def end(*_: object) -> None:
        ended.set()
        agent.wake()

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, end)
    agent.start()
    threads = [_serve(door, agent, ended.is_set) for door in inputs]
    if once:
        threading.Thread(target=_end_after, args=(threads, end), daemon=True).start()
    try:
        agent.run_forever(ended.is_set)
    finally:
        ended.set()
        agent.stop()
    return 0


_stdout_lock = threading.Lock()


def print_answer(answer: dict[str, Any]) -> None:
    """One line of JSON on standard output, at once."""
    line = json.dumps(answer)  # ASCII only: no terminal's or file system's encoding can refuse it
    with _stdout_lock:
        print(line, flush=True)


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
