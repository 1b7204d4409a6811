"""A mosquitto that runs on what `shoal-cloud broker config` wrote, as an operator would start it; and who comes."""

from __future__ import annotations

import os
import pwd
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud_server.cli import main
from cloud_server.deployment import Deployment
from cloud_server.enrolment.ca import CertificateAuthority
from fleet.local_cloud import free_port
from tests.transport.raw_client import RawClient
from wire.primitives import generate_tls_key, make_csr
from wire.transport.broker import BrokerTls, RunningBroker, _command

TENANT, FLEET = "acme", "north"
DAY = 86_400.0
OBSERVER = "observer"
"""Sees and writes everything: added to the access file under test, whose rights for all others stay what they are."""


@dataclass
class Cloud:
    """A state folder, and certificates of its authority and of others."""

    folder: Path
    _contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    def __post_init__(self) -> None:
        words = ["init", "--state", str(self.state), "--tenant", TENANT, "--fleet", FLEET]
        assert main(words) == 0
        with Deployment.open(self.state, {}) as deployment:
            self.authority = deployment.authority

    @property
    def state(self) -> Path:
        return self.folder / "cloud"

    @property
    def ca_file(self) -> Path:
        return self.state / "ca" / "ca.pem"

    def write(self, out: Path, port: int, *words: str) -> None:
        """The operator's command."""
        user = pwd.getpwuid(os.geteuid()).pw_name
        given = ["--host", "localhost", "--host", "127.0.0.1", "--listen", "127.0.0.1", "--port", str(port)]
        command = ["broker", "config", "--state", str(self.state), "--out", str(out), "--user", user]
        assert main([*command, *given, *words]) == 0

    def context(self, name: str) -> ssl.SSLContext:
        """TLS with a good certificate of this name."""
        if name not in self._contexts:
            self._contexts[name] = self.context_of(self.authority, name)
        return self._contexts[name]

    def context_of(
        self, authority: CertificateAuthority, name: str, *, begin: float | None = None, days: float = 7.0
    ) -> ssl.SSLContext:
        """TLS with a certificate that some authority gave out at `begin` (now), for so many days."""
        key = generate_tls_key()
        issued = authority.issue_device(
            make_csr(key, name).decode(), name, now=time.time() if begin is None else begin, days=days
        )
        return self.loaded(key, issued.pem.encode())

    def loaded(self, key: bytes, certificate: bytes) -> ssl.SSLContext:
        """TLS with this key and certificate."""
        pair = self.folder / "pair.pem"
        pair.write_bytes(key + certificate)
        context = self.stranger()
        context.load_cert_chain(pair)
        return context

    def stranger(self) -> ssl.SSLContext:
        """TLS without a certificate."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context


@dataclass(frozen=True)
class Stage:
    """A running broker and the cloud that it belongs to."""

    cloud: Cloud
    broker: RunningBroker
    folder: Path

    @property
    def port(self) -> int:
        return self.broker.port

    def join(self, name: str, *, client_id_claimed: str = "", **options: Any) -> RawClient:
        """A client with a good certificate of this name, which may call itself otherwise."""
        return RawClient(self.port, self.cloud.context(name), client_id_claimed or name, **options)


@contextmanager
def operated(cloud: Cloud, out: Path, *, is_open: bool = False) -> Iterator[Stage]:
    """Starts mosquitto on the written configuration.

    Args:
        is_open: without the access file, and with nothing else changed: what a test expects not to be delivered must
            be delivered here, or the test proves nothing.
    """
    port = free_port()
    cloud.write(out, port)
    configuration, access = out / "mosquitto.conf", out / "access"
    if is_open:
        lines = configuration.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith("acl_file ")]
        assert len(kept) == len(lines) - 1
        configuration.write_text("".join(kept))
    else:
        # In front of what was written: patterns end the file and belong to everybody.
        access.write_text(f"user {OBSERVER}\ntopic readwrite #\ntopic read $SYS/#\n\n{access.read_text()}")
    tls = BrokerTls(cloud.ca_file, out / "broker.pem", out / "broker.key", TENANT, FLEET)
    with RunningBroker(_command("mosquitto", tls), configuration, "127.0.0.1", port, tls) as broker:
        yield Stage(cloud, broker, out)
