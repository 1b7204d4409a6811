"""One real `shoal-edge run` with its doors, as a test sees it: lines in, answers out, what it says in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 90.0


class DeviceProcess:
    """A running agent. A context manager: leaving it ends the process, which must not have ended by itself."""

    def __init__(self, state: Path, *sources: str, token: str) -> None:
        self.answers: list[dict[str, Any]] = []
        self.log_file = state.with_suffix(".log")
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edge_agent.cli", "run", "--state", str(state)]
                + [f"--input={source}" for source in sources],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "SHOAL_ENROLL_TOKEN": token},
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def log(self) -> str:
        """What it has said on standard error."""
        return self.log_file.read_text()

    def write(self, *lines: bytes) -> None:
        """Gives it lines on standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"".join(line + b"\n" for line in lines))
        self._process.stdin.flush()

    def answer(self, name: str) -> dict[str, Any]:
        """Waits for the answer with this id."""
        self.wait_for(
            lambda: any(answer["id"] == name for answer in list(self.answers)), f"an answer to {name}"
        )
        return next(answer for answer in self.answers if answer["id"] == name)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Polls; the limit is only there so that a broken build ends."""
        until = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert self._process.poll() is None, self.log
            assert time.monotonic() < until, f"waited too long for {what}:\n{self.answers[-5:]}\n{self.log}"
            time.sleep(0.02)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.answers.append(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        ended_by_itself = self._process.poll()
        self._process.terminate()
        self._process.wait(DEADLINE_SECONDS)
        self._reader.join(DEADLINE_SECONDS)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        assert ended_by_itself is None, self.log
        assert self._process.returncode == 0, self.log
