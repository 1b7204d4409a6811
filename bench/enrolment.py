"""What one enrolment costs the aggregator: over its real HTTPS port, and inside the service alone.

The device's side is left out where it can be: its keys, requests and proofs are made before the clock starts; the
handshake is in the first row, because every device needs one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench.table import Row
from cloud_server.deployment import Deployment, initialise
from cloud_server.enrolment.service import EnrolmentService
from cloud_server.enrolment.tokens import mint_token
from cloud_server.https import HttpsFront
from cloud_server.settings import CloudSettings, EnrolmentSettings, ListenSettings
from edge_agent.enrolment.https import HttpsConnection, exchange, verified_context
from wire.enrolment import (
    EnrolRequest,
    EnrolResponse,
    LateRenewRequest,
    decode_json,
    encode_json,
    late_proof_bytes,
    proof_bytes,
)
from wire.errors import RefusedError
from wire.primitives import SigningKey, generate_tls_key, make_csr

_DEVICES = 60
_GOAL = "<= 50"

T = TypeVar("T")


def measure() -> list[Row]:
    """Rows of enrolment and late renewal, in milliseconds; the state folder is on this machine's disk."""
    settings = CloudSettings(
        listen=ListenSettings(public_port=0, device_port=0),
        enrolment=EnrolmentSettings(address_per_minute=1_000_000, per_minute=1_000_000),
    )
    with (
        tempfile.TemporaryDirectory(prefix="bench-enrolment-") as place,
        initialise(Path(place) / "state", settings) as deployment,
        HttpsFront(deployment, broker_url="mqtt://127.0.0.1:1883") as front,
    ):
        return _rows(deployment, front)


def _rows(deployment: Deployment, front: HttpsFront) -> list[Row]:
    posted = _Devices(deployment, "posted")
    called = _Devices(deployment, "called")
    post = _times(posted.requests(), lambda request: _post(deployment, front, request))
    call = _times(called.requests(), front.enrolment.enrol)
    late = _times(called.late_requests(front.enrolment), front.enrolment.renew_late)
    return [
        _row("enrolment over HTTPS, handshake and client included", post),
        _row("enrolment, the service alone", call),
        _row("late renewal, the service alone", late),
    ]


@dataclass(frozen=True, slots=True)
class _Taken:
    """Wall seconds of each call, and CPU seconds of this process for one on average."""

    wall: Sequence[float]
    cpu: float


def _row(name: str, taken: _Taken) -> Row:
    slowest = statistics.quantiles(taken.wall, n=20)[-1]
    note = (
        f"median of {len(taken.wall)}; 95th percentile {1e3 * slowest:.1f} ms; {1e3 * taken.cpu:.1f} ms of CPU;"
        " SQLite, every commit on the disk"
    )
    return Row(name, 1e3 * statistics.median(taken.wall), _GOAL, unit="ms", note=note)


def _times(requests: Sequence[T], ask: Callable[[T], object]) -> _Taken:
    ask(requests[0])  # warm: a first answer signs nothing that later ones need not
    seconds = []
    cpu = time.process_time()
    for request in requests[1:]:
        began = time.perf_counter()
        ask(request)
        seconds.append(time.perf_counter() - began)
    return _Taken(seconds, (time.process_time() - cpu) / len(seconds))


def _post(deployment: Deployment, front: HttpsFront, request: EnrolRequest) -> EnrolResponse:
    context = verified_context(deployment.authority.certificate_pem.encode())
    url, name = f"https://127.0.0.1:{front.public_port}", deployment.settings.listen.tls_name
    connection = HttpsConnection(url, tls_name=name, context=context)
    status, data = exchange(connection, "POST", "/v1/enroll", encode_json(request), limit_bytes=2**18)
    if status != 200:
        raise RefusedError(f"enrolment was answered by {status}: {data[:200]!r}")
    return decode_json(data, EnrolResponse)


class _Devices:
    """Devices with a token each, their keys and requests made beforehand."""

    def __init__(self, deployment: Deployment, name: str) -> None:
        self._deployment = deployment
        self._names = [f"{name}-{number}" for number in range(_DEVICES)]
        self._keys = {name: SigningKey.generate() for name in self._names}
        self._csrs = {name: make_csr(generate_tls_key(), name).decode() for name in self._names}

    def requests(self) -> list[EnrolRequest]:
        deployment, found = self._deployment, []
        door = deployment.door(1)
        for name in self._names:
            with deployment.database.transaction() as connection:
                token = mint_token(connection, door, now=deployment.clock.now(), device=name)
            key, csr = self._keys[name], self._csrs[name]
            found.append(
                EnrolRequest(
                    token_id=token.token_id,
                    secret=token.secret,
                    device=name,
                    csr=csr,
                    update_key=key.public_bytes.hex(),
                    proof=key.sign(proof_bytes(token.token_id, name, csr)).hex(),
                )
            )
        return found

    def late_requests(self, service: EnrolmentService) -> list[LateRenewRequest]:
        deployment, found = self._deployment, []
        for name in self._names:
            challenge, csr = service.challenge().challenge, self._csrs[name]
            signed = late_proof_bytes(
                tenant=deployment.settings.tenant,
                fleet=deployment.settings.fleet,
                ca_sha256=deployment.authority.fingerprint,
                device=name,
                challenge=challenge,
                csr=csr,
            )
            proof = self._keys[name].sign(signed).hex()
            found.append(LateRenewRequest(device=name, csr=csr, challenge=challenge, proof=proof))
        return found
