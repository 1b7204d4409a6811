"""The enrolled devices of a load: let in by the real enrolment, in bulk, and kept where their processes find them.

Laws of the file: each device has keys of its own and asks as at any enrolment; only the HTTPS request is left out,
since a fleet enrols over weeks and not in the minute that is measured. Private keys are 0600, as on a device; nothing
is synced to the disk, since the fleet ends with the run. Source: wire/enrolment.py.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from cloud_server.deployment import Deployment
from cloud_server.enrolment.service import EnrolmentService
from cloud_server.enrolment.tokens import mint_token
from edge_agent.device import NamedContext
from edge_agent.enrolment.identity import Identity, from_response
from edge_agent.store.disk import private_opener
from wire.enrolment import EnrolmentToken, EnrolRequest, EnrolResponse, proof_bytes
from wire.primitives import SigningKey, generate_tls_key, make_csr

_PREFIX = "light-"
_WELCOME = "welcome.json"
_ROLL = "roll.jsonl"


class Entry(msgspec.Struct, frozen=True):
    """One line of the roll: a device and its update key (hex)."""

    device: str
    update_key: str


@dataclass(frozen=True, slots=True)
class Roll:
    """A folder of enrolled devices: what one of them was answered, `roll.jsonl`, and `NAME.pem` for each, which is TLS
    key and certificate."""

    folder: Path

    def read(self, first: int, count: int) -> Iterator[Identity]:
        """So many devices from number `first` (0 is the first) on, as they know themselves."""
        welcome = msgspec.json.decode((self.folder / _WELCOME).read_bytes(), type=EnrolResponse)
        any_key = SigningKey.generate()
        # What all of them know alike lies in memory once.
        common = from_response(welcome, url_enrol=welcome.device_url, update_key=any_key, folder=None)
        with (self.folder / _ROLL).open("rb") as lines:
            for number, line in enumerate(lines):
                if first <= number < first + count:
                    entry = msgspec.json.decode(line, type=Entry)
                    key = SigningKey(bytes.fromhex(entry.update_key))
                    yield replace(common, device=entry.device, update_key=key)

    def tls_context(self, identity: Identity) -> NamedContext:
        """Mutual TLS in a device's name, to the broker or to the aggregator."""
        context = NamedContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.expected_name = identity.tls_name
        context.load_verify_locations(cadata=identity.ca_pem.decode("ascii"))
        context.load_cert_chain(self.folder / f"{identity.device}.pem")
        return context


def enrol_fleet(
    deployment: Deployment, folder: Path, devices: int, *, broker_url: str, each: Callable[[], None]
) -> Roll:
    """Enrols so many devices, one after the other, and writes the roll.

    Args:
        folder: is made.
        broker_url: what they are told.
        each: called after each of them.

    Raises:
        EnrolmentError: (us) one was refused.
        StorageError: (disk) the database refused.
    """
    folder.mkdir(parents=True, mode=0o700)
    listen = deployment.settings.listen
    service = deployment.enrolment(deployment.welcome(device_port=listen.device_port, broker_url=broker_url))
    with deployment.database.transaction() as connection:
        now = deployment.clock.now()
        token = mint_token(
            connection, deployment.door(), now=now, device=f"{_PREFIX}*", uses=max(2, devices), approves=True
        )
    roll = Roll(folder)
    with open(folder / _ROLL, "wb", opener=private_opener) as lines:
        for number in range(devices):
            entry, response = _enrol_one(service, token, f"{_PREFIX}{number:05}", folder)
            lines.write(msgspec.json.encode(entry) + b"\n")
            if number == 0:
                (folder / _WELCOME).write_bytes(msgspec.json.encode(response))
            each()
    return roll


def _enrol_one(
    service: EnrolmentService, token: EnrolmentToken, device: str, folder: Path
) -> tuple[Entry, EnrolResponse]:
    tls_key, update_key = generate_tls_key(), SigningKey.generate()
    csr = make_csr(tls_key, device).decode("ascii")
    response = service.enrol(
        EnrolRequest(
            token_id=token.token_id,
            secret=token.secret,
            device=device,
            csr=csr,
            update_key=update_key.public_bytes.hex(),
            proof=update_key.sign(proof_bytes(token.token_id, device, csr)).hex(),
        )
    )
    with open(folder / f"{device}.pem", "wb", opener=private_opener) as file:
        file.write(tls_key + response.certificate.encode("ascii"))
    return Entry(device, update_key.private_bytes().hex()), response
