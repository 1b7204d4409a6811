"""The part of an aggregator that a device meets outside of MQTT: enrolment and the repository over HTTPS, a broker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud_server.artefacts import Artefacts
from cloud_server.enrolment.ca import CertificateAuthority
from cloud_server.keys import CloudKeys
from cloud_server.release.tuf_repository import TufRepository
from models.bundle import Bundle
from models.candidate import CandidateMaker
from process.clock import SystemClock
from tests.edge.https_server import TLS_NAME, Script, https_server
from wire.enrolment import (
    EnrolmentToken,
    EnrolRequest,
    EnrolResponse,
    Refusal,
    RenewRequest,
    RenewResponse,
    decode_json,
    encode_json,
)
from wire.transport.broker import RunningBroker, start_broker


class Repository(dict[str, bytes]):
    """The server's files: the CA, and whatever the TUF repository has now."""

    repository: TufRepository

    def get(self, path: str, default: Any = None) -> Any:
        return super().get(path, default) or self.repository.read(path)


@dataclass
class Aggregator:
    """The HTTPS side of a cloud, one port for all. `days`, `age_days`: of the certificates that it gives out."""

    url: str
    authority: CertificateAuthority
    repository: TufRepository
    keys: CloudKeys
    broker: RunningBroker
    requests: list[EnrolRequest]
    days: float = 7.0
    age_days: float = 0.0
    refuses_renewals: bool = False

    def renew(self, body: bytes, client: str) -> tuple[int, bytes]:
        if self.refuses_renewals:
            return 503, encode_json(Refusal(error="busy", message="try again later"))
        request = decode_json(body, RenewRequest)
        issued = self.authority.issue_device(request.csr, "gate-1", now=time.time() + 60)
        return 200, encode_json(RenewResponse(certificate=issued.pem, ca=self.authority.certificate_pem))

    def enrol(self, body: bytes, client: str) -> tuple[int, bytes]:
        request = decode_json(body, EnrolRequest)
        self.requests.append(request)
        now = time.time() - self.age_days * 86_400
        issued = self.authority.issue_device(request.csr, request.device, now=now, days=self.days)
        kem, orders = self.keys.online_keys()
        answer = EnrolResponse(
            tenant="acme",
            fleet="gates",
            device=request.device,
            certificate=issued.pem,
            ca=self.authority.certificate_pem,
            tuf_root=self.repository.first_root().decode(),
            kem=kem,
            orders=orders,
            tls_name=TLS_NAME,
            device_url=self.url,
            broker_url=f"mqtt://{self.broker.host}:{self.broker.port}",
        )
        return 200, encode_json(answer)

    def token(self, **changes: object) -> str:
        facts: dict[str, object] = {
            "url": self.url,
            "tls_name": TLS_NAME,
            "ca_sha256": self.authority.fingerprint,
            "token_id": "ab" * 8,
            "secret": "s" * 43,
            "device": "gate-1",
            "expires": int(time.time()) + 3600,
        }
        return str(EnrolmentToken(**{**facts, **changes}))  # type: ignore[arg-type]


@contextmanager
def open_aggregator(bundle: Bundle, folder: Path) -> Iterator[Aggregator]:
    """A running aggregator with release 1 of a bundle in its stable ring."""
    authority = CertificateAuthority.create(folder / "ca", name="test CA", now=time.time())
    keys = CloudKeys.from_seed(b"cli tests")
    repository = TufRepository(Artefacts.in_memory(), keys, SystemClock())
    repository.init(online_keys=keys.online_json(tenant="acme", fleet="gates"))
    graphs = {ref.name: bundle.read(ref.name) for ref in bundle.manifest.files}
    repository.add_graphs(
        bundle.manifest.graphs_sha256, {**graphs, "manifest.json": bundle.manifest.to_bytes()}
    )
    candidate = CandidateMaker(bundle).make(bundle.checkpoint().params, bundle.checkpoint().buffers)
    files = {
        "checkpoint.bin": candidate.checkpoint.to_bytes(),
        "golden_inputs.bin": candidate.golden_inputs,
        "golden_outputs.bin": candidate.golden_outputs,
    }
    repository.add_release(candidate.release(1, {}, time.time()), files)
    repository.set_ring("stable", 1)
    served = Repository({"/v1/ca": authority.certificate_pem.encode(), "/healthz": b"{}"})
    served.repository = repository
    script = Script(files=served)
    with (
        start_broker("embedded", folder=folder / "broker") as broker,
        https_server(folder / "server", authority, script, now=time.time()) as url,
    ):
        found = Aggregator(url, authority, repository, keys, broker, [])
        script.post = {"/v1/enroll": found.enrol, "/v1/renew": found.renew}
        yield found
