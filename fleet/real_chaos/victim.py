"""The node that is struck: its processes, one after the other, and what the world sees of it.

Laws of the file: a node that is gone is started again a second later, without a fault; what it had published before it
died is on its way, what it had not is not; strace strikes, nothing of the node knows of it. Source: strace(1),
"Tampering".
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from fleet.real_chaos.link import (
    Begin,
    Ended,
    Fetch,
    File,
    Heard,
    Leave,
    Listen,
    Note,
    Publish,
    Ready,
    Rest,
    Turn,
    Up,
    WorldEnd,
    pair,
)
from fleet.virtual import VirtualTime
from wire.errors import BackpressureError, ConfigurationError, OversizeError, RoundError
from wire.transport import Packet, Published, TransportEvent
from wire.transport.memory import MemoryBroker, MemoryTransport

RESTART_SECONDS: Final = 1.0
RELIEF_SECONDS: Final = 60.0
"""How long a disk stays full."""
MOST_LIVES: Final = 200
_STATUS_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Strike:
    """What strace does to one life.

    Attributes:
        call: name of a system call.
        number: at which of them, from 1.
        act: `KILL`, or an error's name (`ENOSPC`, `EIO`).
        is_lasting: and at each one after it.
    """

    call: str
    number: int
    act: str
    is_lasting: bool = False

    def expression(self) -> str:
        """As strace wants it."""
        what = "signal=KILL" if self.act == "KILL" else f"error={self.act}"
        return f"inject={self.call}:{what}:when={self.number}{'+' if self.is_lasting else ''}"

    def __str__(self) -> str:
        return f"{self.act} at {self.call} {self.number}{' and all after' if self.is_lasting else ''}"


def find_strace() -> str | None:
    """The program, or None."""
    return shutil.which("strace")


class Nursery:
    """A process that forks lives. A context manager."""

    def __init__(self, role: str) -> None:
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door = mine
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fleet.real_chaos.lives", role, str(other.fileno())],
                pass_fds=(other.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if not self._door.recv(_STATUS_BYTES):
            raise RoundError(f"the nursery of a {role} did not start")

    def fork(self) -> tuple[int, WorldEnd]:
        """A new life: its process id, and the link to it."""
        mine, other = pair()
        with other:
            socket.send_fds(self._door, [b"f"], [other.fileno()])
        process_id = int.from_bytes(self._door.recv(_STATUS_BYTES), "big")
        end = WorldEnd(mine)
        if not isinstance(end.receive(), Ready):
            raise RoundError("a life was not born")
        return process_id, end

    def wait(self) -> int:
        """The exit code of the life that was forked last; negative for a signal."""
        return os.waitstatus_to_exitcode(int.from_bytes(self._door.recv(_STATUS_BYTES), "big"))

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._door.close()
        self._process.wait()


@dataclass
class Lives:
    """What became of the processes of a node.

    Attributes:
        codes: exit codes, negative for signals.
        reasons: why it ended by itself.
        notes: what they told the books.
        facts: how the living one is.
        is_first_ended: whether the life that was struck is over.
    """

    codes: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    notes: list[tuple[str, ...]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    told: list[dict[str, Any]] = field(default_factory=list)


class Victim:
    """One node through its lives.

    Args:
        read: a file of the signed repository.
        on_death: called after each end, before the next start.
        strike: what befalls the first life.
        trace: a file for what strace writes; needed for a strike.
    """

    def __init__(
        self,
        nursery: Nursery,
        begin: Callable[[int, float], Begin],
        client: str,
        *,
        time: VirtualTime,
        broker: MemoryBroker,
        read: Callable[[str], bytes | None] = lambda path: None,
        on_death: Callable[[], None] = lambda: None,
        strike: Strike | None = None,
        trace: Path | None = None,
        calls: str = "",
    ) -> None:
        self.lives = Lives()
        self.wake = 0.0
        self.is_up = False
        self._nursery = nursery
        self._begin = begin
        self._client = client
        self._time = time
        self._broker = broker
        self._read = read
        self._on_death = on_death
        self._strike = strike
        self._trace = trace
        self._calls = calls
        self._end: WorldEnd | None = None
        self._tracer: subprocess.Popen[str] | None = None
        self._transport: MemoryTransport | None = None
        self._tokens: dict[int, int] = {}
        self._waiting: list[TransportEvent] = []
        self._count = 0

    @property
    def has_events(self) -> bool:
        return self.is_up and bool(self._waiting)

    def start(self) -> None:
        """A new process, which opens what the last one left."""
        self._count += 1
        if self._count > MOST_LIVES:
            raise RoundError("it does not stay alive", lives=self._count, reasons=self.lives.reasons)
        process_id, self._end = self._nursery.fork()
        if self._trace is not None and self._count == 1:
            self._attach(process_id, self._trace)
        self.is_up = True
        self._end.send(self._begin(self._count, self._time.now()))
        self._listen()

    def turn(self) -> None:
        """Hands over what waits, and lets it do what is due."""
        if self._end is None or not self.is_up:
            return
        events, self._waiting = self._waiting, []
        for event in events:
            if isinstance(event, Published):
                event = Published(self._tokens.pop(event.token, 0), event.accepted, event.reason)
            self._end.send(Heard.of(event))
        self._end.send(Turn(self._time.now()))
        self._listen()

    @property
    def was_killed(self) -> bool:
        """Whether the end that was asked for is the one that was struck."""
        return self._strike is not None and self._strike.act == "KILL" and self._count == 1

    def leave(self) -> int:
        """Asks it to stop; its exit code."""
        if self._end is None or not self.is_up:
            return self.lives.codes[-1] if self.lives.codes else 0
        self._end.send(Leave())
        while (frame := self._end.receive()) is not None:
            self._take(frame)
        self._close()
        return self.lives.codes[-1]

    def relieve(self) -> None:
        """What befell the first life is over: the disk has room again."""
        if self._tracer is not None:
            self._tracer.terminate()
            self._tracer.communicate()
            self._tracer = None

    def kill(self) -> None:
        """Ends it as the end of the play."""
        if self._end is not None and self.is_up:
            self._end.close()
            self._close()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _attach(self, process_id: int, trace: Path) -> None:
        program = find_strace()
        if program is None:
            raise ConfigurationError(
                "strace is not installed here", hint="install it: apt-get install strace"
            )
        command = [program, "-f", "-y", "-p", str(process_id), "-o", str(trace), "-e", f"trace={self._calls}"]
        if self._strike is not None and self._strike.is_lasting:
            self._time.later(RELIEF_SECONDS, self.relieve)
        if self._strike is not None:
            command += ["-e", self._strike.expression()]
        tracer = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self._tracer = tracer
        told = tracer.stderr.readline() if tracer.stderr is not None else ""
        if "attached" not in told:
            raise ConfigurationError(f"strace cannot trace here: {told.strip()}", hint="run it as root")

    def _listen(self) -> None:
        while self._end is not None:
            frame = self._end.receive()
            if frame is None:
                self._died()
                return
            if self._take(frame):
                return

    def _take(self, frame: Up) -> bool:
        """Does what a frame asks for; True when the turn is over."""
        match frame:
            case Rest(wake, facts):
                self.wake, self.lives.facts = wake, facts
                self.lives.told.append(facts)
                return True
            case Listen(filters, will):
                self._transport = MemoryTransport(self._broker, self._client, queue_packets=100_000)
                self._tokens, self._waiting = {}, []
                packet = None if will is None else Packet(*will)
                self._transport.start(self._waiting_for(), filters=filters, will=packet)
            case Publish():
                self._publish(frame)
            case Fetch(path) if self._end is not None:
                self._end.send(File(self._read(path)))
            case Note(what, values):
                self.lives.notes.append((what, *values))
            case Ended(reason):
                self.lives.reasons.append(reason)
        return False

    def _waiting_for(self) -> Callable[[TransportEvent], None]:
        return lambda event: self._waiting.append(event)

    def _publish(self, frame: Publish) -> None:
        if self._transport is None:
            return
        try:
            self._tokens[self._transport.publish(Packet(*frame.packet))] = frame.token
        except (BackpressureError, OversizeError) as error:
            self._waiting.append(Published(-1, accepted=False, reason=str(error)))

    def _died(self) -> None:
        self._close()
        # What had left is on its way; what the broker had for it waits there.
        self._broker.pump()
        if self._transport is not None:
            self._transport.drop("the process is gone", for_seconds=float("inf"))
        self._transport, self._waiting = None, []
        self._on_death()
        self._time.later(RESTART_SECONDS, self.start)

    def _close(self) -> None:
        self.is_up = False
        if self._end is not None:
            self._end.close()
        self._end = None
        self.lives.codes.append(self._nursery.wait())
        if self._tracer is not None:
            self._tracer.communicate()
            self._tracer = None
