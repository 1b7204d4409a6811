"""A real aggregator as a child process of this machine, on a state folder that is made for it."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from cloud_server.db import rounds as books
from cloud_server.deployment import Deployment, initialise
from cloud_server.enrolment.tokens import mint_token
from cloud_server.settings import CloudSettings
from fleet.launch import CLOUD, Launch
from models.bundle import Bundle
from models.data.federation import Federation
from process.options import render_toml
from wire.errors import RoundError

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
HOLDOUT = "holdout.npz"
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_PORT = 10_000
_PORT_ATTEMPTS = 64


class LocalCloud:
    """A running `shoal-cloud run` and its state folder. A context manager: leaving it ends the process.

    Args:
        started_in: the service's working folder, where a `--serverapp` is looked for.
        launch: how the service is started.
        arguments: of `shoal-cloud run`.
        copied_from: another aggregator's state folder, whose keys, authority and settings this one has; only where it
            listens may differ. Its operator copied them, as docs/how-to/standby.md says.
    """

    def __init__(
        self,
        root: Path,
        settings: CloudSettings,
        federation: Federation,
        *,
        started_in: Path | None = None,
        launch: Launch = CLOUD,
        arguments: Sequence[str] = (),
        copied_from: Path | None = None,
    ) -> None:
        self.root = root
        self.settings = settings
        self.log_file = root.with_suffix(".log")
        if copied_from is None:
            self.deployment: Deployment = initialise(root, settings)
        else:
            self.deployment = _copied(copied_from, root, settings)
        operator = federation.operator
        np.savez(root / HOLDOUT, x=operator.val_x, y=operator.val_y)
        self._arguments = tuple(arguments)
        self._started_in = started_in
        self._launch = launch
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the service and waits until it answers.

        Raises:
            RoundError: it does not come up; says where its log is.
        """
        self.launch()
        until = time.monotonic() + _START_SECONDS
        while not self.answers():
            self.check()
            if time.monotonic() > until:
                raise RoundError("the aggregator does not answer", hint=f"see {self.log_file}")
            time.sleep(0.1)

    def launch(self) -> None:
        """Starts the service and does not wait for it."""
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._launch.command("run", "--state", str(self.root.absolute()), *self._arguments),
                cwd=self._started_in,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._launch.variables(),
                start_new_session=self._launch.is_apart,
            )

    @property
    def process_id(self) -> int:
        """Of the child; 0 when there is none."""
        return 0 if self._process is None else self._process.pid

    def import_model(self, bundle: Bundle) -> None:
        """Signs the model's graphs and keeps its bundle, as `shoal-cloud model import` does."""
        self.deployment.keep_bundle(bundle)
        self.deployment.publisher.import_model(bundle)

    def token(self, device: str) -> str:
        """A one-use token for one device."""
        with self.deployment.database.transaction() as connection:
            minted = mint_token(
                connection, self.deployment.door(), now=self.deployment.clock.now(), device=device
            )
        return str(minted)

    def set_paused(self, is_paused: bool) -> None:
        """Pauses or resumes the run, as `shoal-cloud round pause` and `resume` do."""
        with self.deployment.database.transaction() as connection:
            books.set_run_status(connection, self.settings.run.name, "paused" if is_paused else "active")

    def rounds(self) -> list[books.RoundRow]:
        """The run's rounds as the database has them."""
        with self.deployment.database.read() as connection:
            return books.load_rounds(connection, self.settings.run.name)

    @property
    def has_run(self) -> bool:
        """Whether the service has begun its run."""
        with self.deployment.database.read() as connection:
            return books.load_run(connection, self.settings.run.name) is not None

    @property
    def is_finished(self) -> bool:
        """Whether the run has made all of its rounds."""
        with self.deployment.database.read() as connection:
            row = books.load_run(connection, self.settings.run.name)
        return row is not None and row.status == "finished"

    def check(self) -> None:
        """Looks whether the service is alive.

        Raises:
            RoundError: it ended by itself; says where its log is.
        """
        if self._process is not None and self._process.poll() is not None:
            code = self._process.returncode
            raise RoundError(f"the aggregator ended with code {code}", hint=f"see {self.log_file}")

    def stop(self) -> int:
        """Ends the service politely, by force after 20 s; returns its exit code. Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return process.returncode

    def wait(self) -> int:
        """Waits until the service ended by itself; its exit code.

        Raises:
            RoundError: it does not, or it was never started.
        """
        process, self._process = self._process, None
        if process is None:
            raise RoundError("there is no aggregator to wait for")
        try:
            return process.wait(_START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RoundError("the aggregator does not end", hint=f"see {self.log_file}") from None

    def kill(self) -> None:
        """Ends the service as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._launch.is_apart:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        self._process = None

    def __enter__(self) -> LocalCloud:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.deployment.close()

    def answers(self) -> bool:
        """Whether the service answers over HTTPS."""
        context = ssl.create_default_context(cadata=self.deployment.authority.certificate_pem)
        context.check_hostname = False
        listen = self.settings.listen
        connection = http.client.HTTPSConnection(listen.host, listen.public_port, context=context, timeout=2)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _copied(source: Path, root: Path, settings: CloudSettings) -> Deployment:
    root.mkdir(mode=0o700)
    for name in ("keys", "ca", "locks"):
        shutil.copytree(source / name, root / name)
    for name in ("bundles", "broker"):
        (root / name).mkdir(mode=0o700)
    shutil.copy2(source / "FORMAT", root / "FORMAT")
    (root / "settings.toml").write_text(render_toml(settings), encoding="utf-8")
    return Deployment.open(root)


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def steady_port() -> int:
    """A free port that no outgoing connection is given, so that it is still free when a killed program comes back."""
    low = int(_EPHEMERAL.read_text(encoding="ascii").split()[0])
    for port in random.SystemRandom().sample(
        range(_FIRST_PORT, max(low, _FIRST_PORT + 1000)), _PORT_ATTEMPTS
    ):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    return free_port()
