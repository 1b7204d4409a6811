"""Letting a device in, and renewing its certificate.

Laws of the file: everything about one enrolment is one transaction, so that a refused one leaves nothing and
costs no use of a token; a refusal says to the peer what it must know to do better and nothing about other
devices or tokens; the same device may repeat the same request (its answer was lost on the way) and is
answered again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cloud_server.db import devices as device_table
from cloud_server.db.audit import append_audit
from cloud_server.db.devices import APPROVED, QUARANTINED, REVOKED, DeviceRow
from cloud_server.db.engine import Connection, Database
from cloud_server.db.tokens import TokenRow, use_token
from cloud_server.enrolment.ca import CertificateAuthority, Issued
from cloud_server.enrolment.tokens import check_token
from cloud_server.registry import add_device
from process.clock import Clock
from wire.enrolment import (
    EnrolRequest,
    EnrolResponse,
    OnlineKey,
    RenewRequest,
    RenewResponse,
    proof_bytes,
)
from wire.errors import EnrolmentError, EnvelopeError, TrustError
from wire.primitives import VerifyKey

WAITING = "waiting for approval"


@dataclass(frozen=True)
class Welcome:
    """What every device is told when it is let in."""

    tenant: str
    fleet: str
    tls_name: str
    device_url: str
    broker_url: str
    ring: str
    max_examples: int


class EnrolmentService:
    """Enrolment and renewal for one fleet. Safe to use from many threads.

    Args:
        tuf_root: gives the first `root.json`.
        online_keys: gives (KEM keys, order keys) of now.
    """

    def __init__(
        self,
        database: Database,
        authority: CertificateAuthority,
        welcome: Welcome,
        clock: Clock,
        *,
        tuf_root: Callable[[], bytes],
        online_keys: Callable[[], tuple[tuple[OnlineKey, ...], tuple[OnlineKey, ...]]],
    ) -> None:
        self._database = database
        self._authority = authority
        self._welcome = welcome
        self._clock = clock
        self._tuf_root = tuf_root
        self._online_keys = online_keys

    @property
    def ca_pem(self) -> str:
        """The CA certificate, which a token's pin names."""
        return self._authority.certificate_pem

    def enrol(self, request: EnrolRequest) -> EnrolResponse:
        """Lets a device in.

        Raises:
            EnrolmentError: (peer) with `code`, one of `wire.enrolment.RefusalCode`.
        """
        now = self._clock.now()
        key = _proven_key(request)
        try:
            with self._database.transaction() as connection:
                token = check_token(
                    connection, request.token_id, request.secret, device=request.device, now=now
                )
                row = self._repeated(connection, token, request) or self._admit(
                    connection, token, request, key
                )
                issued = self._issue(connection, row, request.csr)
        except TrustError as error:
            raise _refusal(error) from error
        return self._answer(row, issued)

    def renew(self, device: str, serial: str, request: RenewRequest) -> RenewResponse:
        """The next certificate of a device that showed its present one.

        Args:
            device, serial: common name and serial (hex) of the certificate that TLS verified.

        Raises:
            EnrolmentError: (peer) `code` is `revoked` or `csr`.
        """
        with self._database.transaction() as connection:
            row = device_table.load_device(connection, device)
            # Any certificate that was not revoked will do: the answer with the newest may have been lost.
            is_ours = device_table.is_certificate_good(connection, device, serial)
            if row is None or row.status == REVOKED or not is_ours:
                raise EnrolmentError("this certificate is not trusted any more", code="revoked")
            issued = self._issue(connection, row, request.csr)
        return RenewResponse(certificate=issued.pem, ca=self._authority.certificate_pem)

    def _repeated(self, connection: Connection, token: TokenRow, request: EnrolRequest) -> DeviceRow | None:
        """The device that this very request enrolled before; None for a new one."""
        if token.claimed_by != request.device:
            return None
        row = device_table.load_device(connection, request.device)
        is_same = row is not None and row.update_key == request.update_key and row.status != REVOKED
        return row if is_same else None

    def _admit(
        self, connection: Connection, token: TokenRow, request: EnrolRequest, key: VerifyKey
    ) -> DeviceRow:
        if not use_token(connection, token.id, request.device):
            raise EnrolmentError("the token was used", code="token_used", hint="ask for a new token")
        return add_device(
            connection,
            request.device,
            key,
            now=self._clock.now(),
            status=APPROVED if token.approves else QUARANTINED,
            reason="" if token.approves else WAITING,
            ring=self._welcome.ring,
            max_examples=self._welcome.max_examples,
        )

    def _issue(self, connection: Connection, row: DeviceRow, csr: str) -> Issued:
        now = self._clock.now()
        issued = self._authority.issue_device(csr, row.device, now=now)
        device_table.insert_certificate(
            connection, row.device, issued.serial, issued=now, not_after=issued.not_after
        )
        append_audit(
            connection, "certificate.issued", now, {"device": row.pseudonym, "serial": issued.serial}
        )
        return issued

    def _answer(self, row: DeviceRow, issued: Issued) -> EnrolResponse:
        kem, orders = self._online_keys()
        return EnrolResponse(
            tenant=self._welcome.tenant,
            fleet=self._welcome.fleet,
            device=row.device,
            certificate=issued.pem,
            ca=self._authority.certificate_pem,
            tuf_root=self._tuf_root().decode("utf-8"),
            kem=kem,
            orders=orders,
            tls_name=self._welcome.tls_name,
            device_url=self._welcome.device_url,
            broker_url=self._welcome.broker_url,
            ring=row.ring,
            status="approved" if row.status == APPROVED else "quarantined",
            max_examples=row.max_examples,
        )


def _proven_key(request: EnrolRequest) -> VerifyKey:
    """The update key, once its holder has signed this very request with it."""
    try:
        key = VerifyKey(bytes.fromhex(request.update_key))
        if request.update_key != key.public_bytes.hex():
            raise EnrolmentError("the update key is not lower-case hex", code="update_key")
        signed = proof_bytes(request.token_id, request.device, request.csr)
        key.verify(bytes.fromhex(request.proof), signed)
    except (ValueError, TrustError, EnvelopeError) as error:
        raise EnrolmentError("the update key is not proven", code="update_key") from error
    return key


def _refusal(error: TrustError) -> EnrolmentError:
    """A refusal of the registry as one of enrolment; ours passes as it is."""
    if isinstance(error, EnrolmentError):
        return error
    return EnrolmentError(str(error), hint=error.hint, code=error.facts.get("code", "bad_request"))
