"""One real agent that is asked on a schedule, whatever it is doing, and how long each answer took.

Laws of the file: a request is due at its time, and its wait counts from there, so that one which could not be sent
because an earlier one was late is late, too (Tene's "coordinated omission"); an error, and an answer that never comes,
take for ever. The agent is the product's own command, asked through its own door: lines of JSON.
"""

from __future__ import annotations

import json
import math
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fleet.launch import AGENT
from models.data.federation import Split
from wire.errors import RoundError

_STOP_SECONDS = 15.0
_ANSWER_SECONDS = 20.0
BETWEEN = ""
"""The phase of requests that no figure counts."""


class AskedAgent:
    """A running `shoal-edge run` with its labelled windows, and two threads that ask and listen.

    Attributes:
        phase: under which the requests that become due now are counted.
        releases: that answered, in the order in which they first did after another one.
    """

    def __init__(
        self, device: str, state: Path, settings: Path, token: str, split: Split, *, rate_hz: float
    ) -> None:
        self.phase = BETWEEN
        self.releases: list[int] = []
        self.state = state
        self._interval = 1.0 / rate_hz
        self._lines = [json.dumps({"window": window.tolist()})[:-1] for window in split.test_x]
        self._due: dict[int, tuple[float, str]] = {}
        self._seconds: dict[str, list[float]] = {}
        self._labelled = len(split.train_x) + len(split.val_x)
        self._labelled_answers = 0
        self._lock = threading.Lock()
        self._asking, self._stopping = threading.Event(), threading.Event()
        self.log_file = state.with_suffix(".log")
        doors = _labelled_files(state.with_suffix(".data"), split)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                AGENT.command(
                    *("run", "--state", str(state), "--settings", str(settings)),
                    *(f"--input={door}" for door in (*doors, "-")),
                ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=AGENT.variables(SHOAL_ENROLL_TOKEN=token),
            )
        self._threads = [
            threading.Thread(target=call, name=f"{device}-{call.__name__}", daemon=True)
            for call in (self._ask, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def is_taught(self) -> bool:
        """Whether every labelled window was answered, and therefore kept."""
        return self._labelled_answers >= self._labelled

    @property
    def is_connected(self) -> bool:
        """Whether it says that it has its broker."""
        try:
            return bool(json.loads((self.state / "status.json").read_bytes()).get("connected"))
        except (OSError, ValueError):
            return False

    def begin(self) -> None:
        """Asks from now on."""
        self._asking.set()

    @contextmanager
    def counted(self, phase: str) -> Iterator[None]:
        """Requests that become due inside belong to a phase."""
        self.phase = phase
        try:
            yield
        finally:
            self.phase = BETWEEN

    def seconds(self, phase: str) -> list[float]:
        """How long the answers of a phase took; infinite where there was an error or none. Waits for the last ones."""
        until = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < until and self._waiting(phase):
            time.sleep(0.05)
        with self._lock:
            missing = sum(name == phase for _, name in self._due.values())
            return [*self._seconds.get(phase, []), *[math.inf] * missing]

    def check(self) -> None:
        """Raises `RoundError` when the agent has ended."""
        code = self._process.poll()
        if code is not None and not self._stopping.is_set():
            raise RoundError(f"the agent ended with code {code}", hint=f"see {self.log_file}")

    def stop(self) -> None:
        """Ends the agent politely, by force after a while."""
        self._stopping.set()
        self._asking.set()
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(_STOP_SECONDS)

    def _waiting(self, phase: str) -> bool:
        with self._lock:
            return any(name == phase for _, name in self._due.values())

    def _ask(self) -> None:
        stream = self._process.stdin
        if stream is None:
            return
        self._asking.wait()
        due, number = time.monotonic(), 0
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            line = f'{self._lines[number % len(self._lines)]}, "id": "live-{number}"}}\n'.encode()
            with self._lock:
                self._due[number] = (due, self.phase)
            try:
                stream.write(line)
                stream.flush()
            except (BrokenPipeError, ValueError):
                return  # the agent ended; `check` says so
            number += 1
            due += self._interval

    def _listen(self) -> None:
        if self._process.stdout is None:
            return
        for line in self._process.stdout:
            now = time.monotonic()
            answer = json.loads(line)
            kind, _, number = str(answer["id"]).partition("live-")
            if kind or not number.isdigit():
                self._labelled_answers += 1
                continue
            release = int(answer.get("release", 0))
            with self._lock:
                due, phase = self._due.pop(int(number))
                self._seconds.setdefault(phase, []).append(math.inf if "error" in answer else now - due)
            if release and (not self.releases or self.releases[-1] != release):
                self.releases.append(release)


def _labelled_files(folder: Path, split: Split) -> list[Path]:
    """The labelled windows as a user would have them; the doors for them."""
    folder.mkdir(parents=True, exist_ok=True)
    doors = []
    for name, x, y in (("train", split.train_x, split.train_y), ("val", split.val_x, split.val_y)):
        doors.append(folder / f"windows.{name}.npy")
        np.save(doors[-1], x)
        np.save(folder / f"windows.{name}.labels.npy", y)
    return doors
