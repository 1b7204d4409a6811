"""Flower's own deployment on loopback: a SuperLink, SuperNodes, and a stock app that is submitted with `flwr run`.

Laws of the file: Flower's commands with Flower's defaults, but for what keeps it on this machine (`--insecure`, a home
in a temporary folder, telemetry off, no installation of dependencies at run time); every process that it starts is
ended. Recipe: Flower 1.41, "Run Flower with the Deployment Engine".
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fleet.local_cloud import free_port
from fleet.processes import end_family
from wire.errors import RoundError

APP = Path(__file__).with_name("noise_app")
POLL_SECONDS = 0.02
LIMIT_SECONDS = 420.0
_START_SECONDS = 60.0
_CONNECTION = "bench"


@dataclass(frozen=True, slots=True)
class Mark:
    """The beginning (`begin`) or end (`end`) of a round, as the ServerApp wrote it down (unix seconds)."""

    what: str
    round: int
    messages: int
    time: float


class FlowerDeployment:
    """A running SuperLink and `nodes` SuperNodes. A context manager: leaving it ends all of their processes."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self._folder = folder
        self._home = folder / "home"
        self._home.mkdir(parents=True)
        self._port = free_port()
        self._nodes = nodes
        self._runs = 0
        self._write_connection()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.node_process_ids: list[int] = []
        with ExitStack() as stack:
            self._start_link(stack)
            for number in range(nodes):
                self._start_node(stack, number)
            self._stack = stack.pop_all()

    def run(self, params: int, rounds: int, on_mark: Callable[[Mark], None]) -> list[Mark]:
        """Submits the app and follows it to its last round; `on_mark` is called at most 20 ms after each mark.

        Raises:
            RoundError: a process ended, the app was refused, or it took too long.
        """
        self._runs += 1
        marks = self._folder / f"marks-{self._runs}.jsonl"
        marks.touch()
        config = {
            "num-nodes": self._nodes,
            "num-server-rounds": rounds,
            "params": params,
            "marks": str(marks),
        }
        self._submit(config)
        seen: list[Mark] = []
        until = time.monotonic() + LIMIT_SECONDS
        while len(seen) < 2 * rounds:
            lines = marks.read_text(encoding="utf-8").splitlines(keepends=True)
            for line in lines[len(seen) :]:
                if line.endswith("\n"):
                    seen.append(Mark(**json.loads(line)))
                    on_mark(seen[-1])
            self.check()
            if time.monotonic() > until:
                raise RoundError("Flower's run took too long", hint=f"see the logs in {self._folder}")
            time.sleep(POLL_SECONDS)
        return seen

    @property
    def process_ids(self) -> list[int]:
        """Of the SuperLink and the SuperNodes."""
        return [process.pid for process in self._processes]

    def check(self) -> None:
        """Looks whether the SuperLink and the SuperNodes are alive.

        Raises:
            RoundError: one has ended; says where the logs are.
        """
        for process in self._processes:
            if process.poll() is not None:
                raise RoundError(
                    f"a process of Flower's ended with code {process.returncode}",
                    hint=f"see the logs in {self._folder}",
                )

    def __enter__(self) -> FlowerDeployment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start_link(self, stack: ExitStack) -> None:
        """The SuperLink; it answers HTTP when it is ready."""
        self._start(
            stack,
            "flower-superlink",
            "superlink",
            *("--insecure", "--disable-runtime-dependency-installation"),
            *("--host", "127.0.0.1", "--port", str(self._port)),
        )
        until = time.monotonic() + _START_SECONDS
        while not _listens(self._port):
            self.check()
            if time.monotonic() > until:
                raise RoundError("the SuperLink does not answer", hint=f"see the logs in {self._folder}")
            time.sleep(POLL_SECONDS)

    def _start_node(self, stack: ExitStack, number: int) -> None:
        process = self._start(
            stack,
            "flower-supernode",
            f"supernode-{number}",
            *("--insecure", "--superlink", f"127.0.0.1:{self._port}"),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", f"partition-id={number} num-partitions={self._nodes}"),
        )
        self.node_process_ids.append(process.pid)

    def _start(self, stack: ExitStack, program: str, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [_program(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        stack.callback(end_family, process)
        self._processes.append(process)
        return process

    def _submit(self, config: Mapping[str, Any]) -> None:
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        done = subprocess.run(
            [_program("flwr"), "run", str(APP), _CONNECTION, "--run-config", text],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self._environment(),
            timeout=_START_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RoundError(
                f"flwr run ended with code {done.returncode}: {(done.stdout + done.stderr)[-600:]}"
            )

    def _environment(self) -> dict[str, str]:
        programs = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_HOME": str(self._home),
            "HOME": str(self._home),
            "PATH": os.pathsep.join((programs, os.environ.get("PATH", os.defpath))),
            "OMP_NUM_THREADS": "1",
        }

    def _write_connection(self) -> None:
        (self._home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
            f'[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n',
            encoding="utf-8",
        )


def _program(name: str) -> str:
    """A command of the environment that this interpreter belongs to."""
    return str(Path(sys.executable).with_name(name))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
