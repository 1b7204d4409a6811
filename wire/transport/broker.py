"""Starts a broker on this machine: mosquitto as a child when it is on PATH, else the embedded one.

Laws: the child dies with its parent; what is returned has answered a fresh connection (without TLS, a CONNECT);
without TLS a broker listens on this machine only, and the embedded one, which verifies no certificate and has no
access control, always does: any other address is refused. Source: docs/protocol.md, clause 2.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Literal

from wire.errors import BrokerError, ConfigurationError
from wire.transport.broker_access import mosquitto_access
from wire.transport.broker_configuration import (
    BrokerLimits,
    BrokerSite,
    BrokerTls,
    embedded_configuration,
    mosquitto_configuration,
)
from wire.transport.broker_probe import end_session, probe
from wire.transport.dial import describe

__all__ = [
    "BrokerLimits",
    "BrokerTls",
    "RunningBroker",
    "end_session",
    "find_mosquitto",
    "probe",
    "start_broker",
]

Kind = Literal["auto", "mosquitto", "embedded"]

_START_SECONDS = 15.0
_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.02
_PORT_ATTEMPTS = 3
_LOG_TAIL_BYTES = 600
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a probe finds what listens everywhere

# `exec` keeps mosquitto in the process that we started; the shell's child waits at our end of the pipe and
# ends it when we are gone, but not when it reads a line, which says that mosquitto has ended (its number may
# be another's by then). PDEATHSIG would not do: it fires when the *thread* that started the child ends.
_WITH_PARENT = 'exec 3<&0; (read -r _ <&3 || kill -TERM $$) & exec "$@" 3<&- </dev/null'


class RunningBroker:
    """A broker that we started. A context manager: leaving it stops the broker."""

    def __init__(
        self, command: tuple[str, ...], configuration: Path, host: str, port: int, tls: BrokerTls | None
    ) -> None:
        self.kind = command[0]
        self.host = host
        self.port = port
        self.log_file = configuration.with_name("broker.log")
        self._arguments = (*command[1:], str(configuration.resolve()))
        self._tls = tls
        self._process = self._start()

    @property
    def process_id(self) -> int:
        """Of the child."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the child runs; `answers` says whether it also works."""
        return self._process.poll() is None

    def answers(self) -> bool:
        """Whether the child runs and accepts a fresh connection (with TLS: completes the handshake)."""
        try:
            self._probe()
        except BrokerError:
            return False
        return self.is_alive()

    def revive(self) -> bool:
        """Starts the child anew, on the same port, when it no longer answers; returns whether it did.

        For the owner's timer: the embedded broker's listener can die while its process and old connections
        live on.

        Raises:
            BrokerError: it does not come back.
        """
        if self.answers():
            return False
        self.kill()
        self._process = self._start()
        return True

    def restart(self) -> None:
        """Ends the child well and starts it anew on the same port: what its files say now counts for everybody.

        Raises:
            BrokerError: it does not come back; `revive` tries again.
        """
        self.stop()
        self._process = self._start()

    def reload(self) -> None:
        """Makes mosquitto read access file, certificates and revocation list again. Connections stay.

        Whoever is just being let in may still be judged by the old list, as the signal comes late; who gets a CONNACK
        on a connection that he opened after this call knows that the new one counts from now on.
        """
        if self.kind == "mosquitto" and self.is_alive():
            self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """Ends the broker, by force after 5 s. Safe to call twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        _release(self._process)

    def kill(self) -> None:
        """Ends the broker as a crash would."""
        self._process.kill()
        _release(self._process)

    def __enter__(self) -> RunningBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log_file.open("ab") as log:
            process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.PIPE,  # the child's sign that we live
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],  # where `-m wire…` is found in a source tree
            )
        try:
            self._wait_until_it_answers(process)
        except BaseException:
            process.kill()
            _release(process)
            raise
        return process

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            if process.poll() is not None:
                raise BrokerError(f"the {self.kind} broker ended at its start: {_tail(self.log_file)}")
            try:
                self._probe()
            except BrokerError as error:
                if time.monotonic() > deadline:
                    raise BrokerError(f"{error}; its log ends with: {_tail(self.log_file)}") from error
                time.sleep(_POLL_SECONDS)
            else:
                if process.poll() is None:  # else another process took the port between, and answered
                    return

    def _probe(self) -> None:
        context = None
        if self._tls is not None:
            context = ssl.create_default_context(cafile=str(self._tls.ca_file))
            context.check_hostname = False  # its name is the clients' matter; here it is our own child
        host = _ANY_ADDRESS.get(self.host, self.host)
        probe(host, self.port, tls=context, handshake_only=context is not None, timeout_seconds=2.0)


def start_broker(
    kind: Kind = "auto",
    *,
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: BrokerTls | None = None,
    limits: BrokerLimits | None = None,
) -> RunningBroker:
    """Starts a broker and waits until it answers.

    Args:
        kind: "auto" takes mosquitto if it is on PATH, else the embedded one.
        folder: configuration, log and mosquitto's database; made if absent.
        host: address to listen on.
        port: 0 takes a free one.
        tls: mutual TLS and access rules; mosquitto only.

    Raises:
        BrokerError: nothing can be started, or it does not answer (the end of its log is in the message).
        ConfigurationError: (operator) an unknown kind, an address that would be open to all, or names that
            cannot stand in a topic.
    """
    if kind not in ("auto", "mosquitto", "embedded"):
        raise ConfigurationError(f"no broker is called {kind!r}", hint="auto, mosquitto or embedded")
    limits = limits if limits is not None else BrokerLimits()
    _check_address(kind, host, tls)
    command = _command(kind, tls)
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(_PORT_ATTEMPTS):
        chosen = _claim_port(host, port)
        configuration = _configure(command[0], folder, host, chosen, limits, tls)
        try:
            return RunningBroker(command, configuration, host, chosen, tls)
        except BrokerError:
            # Between our choice of a free port and the broker's own bind another process may have taken it.
            if port or attempt == _PORT_ATTEMPTS - 1:
                raise
    raise BrokerError("no broker was started")


def _check_address(kind: Kind, host: str, tls: BrokerTls | None) -> None:
    if host in _LOOPBACK:
        return
    if kind == "embedded":
        raise ConfigurationError(
            f"the embedded broker knows neither certificates nor access rights, and does not listen on {host}",
            hint="it is for one machine: use 127.0.0.1, or mosquitto with certificates",
        )
    if tls is None:
        raise ConfigurationError(
            f"without TLS a broker lets everybody in, and does not listen on {host}",
            hint="use 127.0.0.1, or give it certificates",
        )


def _command(kind: Kind, tls: BrokerTls | None) -> tuple[str, ...]:
    """("mosquitto" or "embedded", program, arguments…) without the configuration file, which comes last."""
    mosquitto = find_mosquitto() if kind != "embedded" else None
    if mosquitto is not None:
        return ("mosquitto", "/bin/sh", "-c", _WITH_PARENT, "sh", mosquitto, "-c")
    if kind == "mosquitto" or tls is not None:
        why = "; the embedded broker verifies no certificates" if tls is not None else ""
        raise BrokerError(f"mosquitto is not on PATH{why}", hint="install it (Debian: apt install mosquitto)")
    if importlib.util.find_spec("iotcore") is None:
        raise BrokerError(
            "there is no MQTT broker: neither mosquitto on PATH nor the embedded one",
            hint="apt install mosquitto, or pip install 'shoal[cloud]'",
        )
    return ("embedded", sys.executable, "-m", "wire.transport.broker_process")


def find_mosquitto() -> str | None:
    """Where mosquitto is on this machine; None where it is not."""
    # Debian puts it where only root's PATH looks.
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def _configure(
    kind: str, folder: Path, host: str, port: int, limits: BrokerLimits, tls: BrokerTls | None
) -> Path:
    if kind == "embedded":
        listen = {"localhost": "127.0.0.1", "::1": "[::1]"}.get(host, host)
        text = embedded_configuration(listen, port, limits)
    else:
        folder = folder.resolve()
        # Started by root, mosquitto becomes a user who cannot read our files, unless it is told to stay.
        user = "root" if os.geteuid() == 0 else ""
        text = mosquitto_configuration(
            BrokerSite(host, port, folder, folder / "access", user), limits, tls and tls.resolved()
        )
        if tls is not None:
            access = folder / "access"
            access.write_text(mosquitto_access(tls.tenant, tls.fleet, tls.aggregators), encoding="utf-8")
            access.chmod(0o600)
    configuration = folder / ("broker.toml" if kind == "embedded" else "broker.conf")
    configuration.write_text(text, encoding="utf-8")
    return configuration


def _release(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    leash = process.stdin
    if leash is not None and not leash.closed:
        try:
            leash.write(b"\n")
            leash.close()
        except BrokenPipeError:  # the embedded broker has no watcher that outlives it
            return


def _tail(log_file: Path) -> str:
    text = log_file.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()
    return " / ".join(text.splitlines()[-5:]) or "(nothing)"


def _claim_port(host: str, port: int) -> int:
    """The port itself, or a free one for 0.

    Raises:
        BrokerError: somebody listens there: its answer to our probe would be taken for that of our child.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as claim:
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as brokers do, after a restart
        try:
            claim.bind((host, port))
        except OSError as error:
            raise BrokerError(
                f"the broker cannot listen at {host} port {port}: {describe(error)}",
                hint="stop what listens there, or choose another port (0: any)",
            ) from error
        chosen: int = claim.getsockname()[1]
        return chosen
