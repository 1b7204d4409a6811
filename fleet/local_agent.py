"""One real agent as a child process of this machine: its token, its stream of windows, its answers.

Laws of the file: the agent gets what any agent gets (a token, settings, labelled files, lines of JSON) and is judged
by what any agent shows (lines of JSON, its status file); windows come at a fixed rate whatever the agent is doing, and
every one of them must be answered.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fleet.launch import AGENT, Launch
from models.data.federation import Split
from wire.errors import RoundError

_STOP_SECONDS = 15.0


class LocalAgent:
    """A running `shoal-edge run`.

    Args:
        state: its state folder, which it enrols into with `token` at its first start.
        split: its data: labelled training and validation windows from files, and its later windows, unlabelled, again
            and again on standard input.
        rate_hz: unlabelled windows a second.
        launch: how the agent is started.
    """

    def __init__(
        self,
        device: str,
        state: Path,
        settings: Path,
        token: str,
        split: Split,
        *,
        rate_hz: float,
        launch: Launch = AGENT,
    ) -> None:
        self.device = device
        self.state = state
        self.answers: Counter[int] = Counter()
        self.errors = 0
        self.sent = 0
        self._split = split
        self._interval = 1.0 / rate_hz
        self._stopping = threading.Event()
        self._labelled_answers = 0
        state.mkdir(parents=True, exist_ok=True)
        doors = [*self._write_labelled(state.with_suffix(".data")), "-"]
        self.log_file = state.with_suffix(".log")
        self._launch = launch
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                launch.command(
                    *("run", "--state", str(state), "--settings", str(settings)),
                    *(f"--input={door}" for door in doors),
                ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=launch.variables(SHOAL_ENROLL_TOKEN=token),
                start_new_session=launch.is_apart,
            )
        self._threads = [
            threading.Thread(target=call, name=f"{device}-{name}", daemon=True)
            for name, call in (("feed", self._feed), ("answers", self._read))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def process_id(self) -> int:
        """Of the child."""
        return self._process.pid

    @property
    def labelled(self) -> int:
        """Labelled windows that the agent gets."""
        return len(self._split.train_x) + len(self._split.val_x)

    @property
    def is_taught(self) -> bool:
        """Whether every labelled window was answered, and therefore kept."""
        return self._labelled_answers >= self.labelled

    @property
    def answered(self) -> int:
        """Windows that were answered by a model."""
        return sum(self.answers.values())

    @property
    def release(self) -> int:
        """The newest release that answered."""
        return max(self.answers, default=0)

    def check(self) -> None:
        """Looks whether the agent is alive.

        Raises:
            RoundError: it ended by itself; says where its log is.
        """
        code = self._process.poll()
        if code is not None and not self._stopping.is_set():
            raise RoundError(f"agent {self.device} ended with code {code}", hint=f"see {self.log_file}")

    def status(self) -> Mapping[str, Any]:
        """What the agent wrote of itself last; empty when it has not yet."""
        try:
            plain = json.loads((self.state / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return plain if isinstance(plain, dict) else {}

    def stop_feeding(self) -> None:
        """Ends the stream of windows; what was sent is still answered."""
        self._stopping.set()
        self._threads[0].join(_STOP_SECONDS)

    def stop(self) -> int:
        """Ends the agent politely, by force after 15 s; returns its exit code. Safe to call twice."""
        self._stopping.set()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._release()
        return self._process.returncode

    def kill(self) -> None:
        """Ends the agent as a crash would. Safe to call twice, and on one that ended by itself."""
        self._stopping.set()
        self._process.kill()
        self._process.wait()
        self._release()

    def end_children(self) -> None:
        """Ends what an agent that was killed left behind, where it was started apart."""
        if self._launch.is_apart:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _release(self) -> None:
        for thread in self._threads:
            thread.join(_STOP_SECONDS)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    # ---- the two threads ---------------------------------------------------------------------------------------

    def _feed(self) -> None:
        stream = self._process.stdin
        if stream is None:
            return
        try:
            due = time.monotonic()
            for number, line in enumerate(self._live_lines()):
                due += self._interval
                if self._stopping.wait(max(0.0, due - time.monotonic())):
                    break
                self._is_due(number, due)
                stream.write(line)
                stream.flush()
                self.sent += 1
        except (BrokenPipeError, ValueError):
            return  # the agent ended; `check` says so

    def _is_due(self, number: int, due: float) -> None:
        """A window is about to be sent whose time was `due`, in monotonic seconds."""

    def _write_labelled(self, folder: Path) -> list[Path]:
        """The labelled windows as files, as a user would have them; returns the doors for them."""
        folder.mkdir(exist_ok=True)
        split = self._split
        doors = []
        for name, x, y in (("train", split.train_x, split.train_y), ("val", split.val_x, split.val_y)):
            doors.append(folder / f"windows.{name}.npy")
            np.save(doors[-1], x)
            np.save(folder / f"windows.{name}.labels.npy", y)
        self.sent = len(split.train_x) + len(split.val_x)
        return doors

    def _live_lines(self) -> Iterator[bytes]:
        lines = [json.dumps({"window": window.tolist()})[:-1].encode() for window in self._split.test_x]
        number = 0
        while True:
            yield lines[number % len(lines)] + f', "id": "live-{number}"}}\n'.encode()
            number += 1

    def _read(self) -> None:
        if self._process.stdout is None:
            return
        for line in self._process.stdout:
            self._answered(json.loads(line))

    def _answered(self, answer: Mapping[str, Any]) -> None:
        """An answer came."""
        if "error" in answer:
            self.errors += 1
        else:
            self.answers[int(answer["release"])] += 1
        if not str(answer["id"]).startswith("live-"):
            self._labelled_answers += 1
