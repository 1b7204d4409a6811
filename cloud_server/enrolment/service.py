"""Letting a device in, and renewing its certificate.

Laws of the file: everything about one enrolment is one transaction, so that a refused one leaves nothing and
costs no use of a token; whoever does not know a token's secret is told nothing and never waits for a lock of
ours; a refusal says to the peer what it must know to do better and nothing about other devices or tokens, and
all of it to the operator's log; the same device may repeat the same request (its answer was lost on the way)
and is answered again; a spent token that somebody else shows is an alarm.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cloud_server.db import devices as device_table
from cloud_server.db.audit import append_audit
from cloud_server.db.devices import APPROVED, QUARANTINED, REVOKED, DeviceRow
from cloud_server.db.engine import Connection, Database
from cloud_server.db.tokens import TokenRow, note_reclaimed, use_token
from cloud_server.enrolment.authorities import AuthoritySource
from cloud_server.enrolment.ca import Issued
from cloud_server.enrolment.challenges import Challenges
from cloud_server.enrolment.queue import CLAIMED_TWICE, WAITING
from cloud_server.enrolment.tokens import check_open, find_token
from cloud_server.registry import add_device
from process.clock import Clock
from process.logs import get_logger
from wire.enrolment import (
    Challenge,
    EnrolRequest,
    EnrolResponse,
    LateRenewRequest,
    OnlineKey,
    RenewRequest,
    RenewResponse,
    late_proof_bytes,
    proof_bytes,
)
from wire.errors import EnrolmentError, EnvelopeError, TrustError
from wire.primitives import SigningKey, VerifyKey

OUTCOMES = ("enrolled", "waiting", "renewed", "renewed_late", "refused", "claimed_twice")
DEFAULT_GRACE_SECONDS = 90 * 86_400.0

_log = get_logger("cloud.enrolment")


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
        authorities: gives the authorities of now.
        tuf_root: gives the first `root.json`.
        online_keys: gives (KEM keys, order keys) of now.
        grace_seconds: how long after the end of its certificate a device may still renew by its update key.
    """

    def __init__(
        self,
        database: Database,
        authorities: AuthoritySource,
        welcome: Welcome,
        clock: Clock,
        *,
        tuf_root: Callable[[], bytes],
        online_keys: Callable[[], tuple[tuple[OnlineKey, ...], tuple[OnlineKey, ...]]],
        grace_seconds: float = DEFAULT_GRACE_SECONDS,
    ) -> None:
        self._database = database
        self._authorities = authorities
        self._welcome = welcome
        self._clock = clock
        self._tuf_root = tuf_root
        self._online_keys = online_keys
        self._grace_seconds = grace_seconds
        self._challenges = Challenges(clock)
        # Stands for a device that does not exist: its private half is gone.
        self._nobody = SigningKey.generate().verify_key
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    @property
    def ca_pem(self) -> str:
        """The CA certificate, which a token's pin names."""
        return self._authorities().door.certificate_pem

    def counts(self) -> Mapping[str, int]:
        """What became of requests since the start, by `OUTCOMES`."""
        with self._lock:
            return dict(self._counts)

    def enrol(self, request: EnrolRequest, address: str = "") -> EnrolResponse:
        """Lets a device in.

        Args:
            address: where it came from, for the log.

        Raises:
            EnrolmentError: (peer) with `code`, one of `wire.enrolment.RefusalCode`.
        """
        try:
            row, issued = self._enrol(request)
        except TrustError as error:
            refused = _refusal(error)
            code = refused.facts.get("code")
            self._note_refused(code, request.device, address, id=request.token_id[:64])
            if code == "token_used":
                self._look_at_second_claim(request, address)
            raise refused from error
        self._count("enrolled" if row.status == APPROVED else "waiting")
        _log.info("device_enrolled", device=row.device, status=row.status, id=row.token, address=address)
        return self._answer(row, issued)

    def renew(self, device: str, serial: str, request: RenewRequest) -> RenewResponse:
        """The next certificate of a device that showed its present one.

        Args:
            device, serial: common name and serial (hex) of the certificate that TLS verified.

        Raises:
            EnrolmentError: (peer) `code` is `revoked` or `csr`.
        """
        try:
            with self._database.transaction() as connection:
                row = device_table.load_device(connection, device)
                # Any certificate that was not revoked will do: the answer with the newest may have been lost.
                is_ours = device_table.is_certificate_good(connection, device, serial)
                if row is None or row.status == REVOKED or not is_ours:
                    raise EnrolmentError("this certificate is not trusted any more", code="revoked")
                issued = self._issue(connection, row, request.csr)
        except EnrolmentError as error:
            self._note_refused(error.facts.get("code"), device, "")
            raise
        self._count("renewed")
        return RenewResponse(certificate=issued.pem, ca=self.ca_pem)

    def challenge(self) -> Challenge:
        """What a device without a valid certificate signs next."""
        return Challenge(challenge=self._challenges.make())

    def renew_late(self, request: LateRenewRequest, address: str = "") -> RenewResponse:
        """The next certificate of a device whose own has expired, and that signs with its update key.

        Raises:
            EnrolmentError: (peer) `code` is `challenge` or `update_key`; and for whoever proved to be the device,
                `revoked`, `quarantined`, `too_late` or `csr`.
        """
        try:
            self._check_late_proof(request)
            with self._database.transaction() as connection:
                row = device_table.load_device(connection, request.device)
                if row is None:
                    raise EnrolmentError("the device's key is not proven", code="update_key")
                self._check_late(row)
                issued = self._issue(connection, row, request.csr, kind="certificate.issued_late")
        except EnrolmentError as error:
            self._note_refused(error.facts.get("code"), request.device, address)
            raise
        self._count("renewed_late")
        _log.info("certificate_renewed_late", device=row.device, address=address)
        return RenewResponse(certificate=issued.pem, ca=self.ca_pem)

    # ---- enrolment, step by step ----

    def _enrol(self, request: EnrolRequest) -> tuple[DeviceRow, Issued]:
        key = _proven_key(request)
        with self._database.read() as connection:
            find_token(connection, request.token_id, request.secret, hold=False)
        with self._database.transaction() as connection:
            token = find_token(connection, request.token_id, request.secret)
            row = self._repeated(connection, token, request)
            if row is None:
                row = self._admit(connection, token, request, key)
            elif token.expires < self._clock.now():
                raise EnrolmentError(
                    "the token has expired", code="token_expired", hint="ask for a new token"
                )
            return row, self._issue(connection, row, request.csr)

    def _repeated(self, connection: Connection, token: TokenRow, request: EnrolRequest) -> DeviceRow | None:
        """The device that this very request enrolled before; None for a new one."""
        row = device_table.load_device(connection, request.device)
        if row is None or row.status == REVOKED or row.update_key != request.update_key:
            return None
        return row if token.id == row.token or token.claimed_by == row.device else None

    def _admit(
        self, connection: Connection, token: TokenRow, request: EnrolRequest, key: VerifyKey
    ) -> DeviceRow:
        check_open(token, device=request.device, now=self._clock.now())
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
            token=token.id,
        )

    def _look_at_second_claim(self, request: EnrolRequest, address: str) -> None:
        """Two parties had the secret of a token that was for one: the first may be the thief, so it waits.

        Once for each token, so that whoever has an old one cannot shut out a device that an operator has looked
        at since. The first claimant itself, who repeats itself after its end, is no second one.
        """
        now = self._clock.now()
        with self._database.transaction() as connection:
            token = find_token(connection, request.token_id, request.secret)
            first = device_table.load_device(connection, token.claimed_by)
            if token.uses != 1 or first is None or first.update_key == request.update_key:
                return
            if not note_reclaimed(connection, token.id, now):
                return
            append_audit(
                connection, "token.claimed_twice", now, {"token": token.id, "device": first.pseudonym}
            )
            if first.status != REVOKED:
                reason = CLAIMED_TWICE if first.status == APPROVED else f"{first.reason}; {CLAIMED_TWICE}"
                device_table.update_device(connection, first.device, status=QUARANTINED, reason=reason)
                changed = {"device": first.pseudonym, "changed": ["reason", "status"]}
                append_audit(connection, "device.quarantined", now, changed)
        self._count("claimed_twice")
        _log.warning(
            "enrolment_claimed_twice",
            id=token.id,
            first=first.device,
            second=request.device[:64],
            address=address,
            hint=f"find out who is who: shoal-cloud device approve {first.device}, or revoke it",
        )

    # ---- late renewal, step by step ----

    def _check_late_proof(self, request: LateRenewRequest) -> None:
        """Nobody but the holder of the device's update key, over a challenge of ours, gets past this.

        An unknown device and a wrong signature are one refusal, reached by the same work.
        """
        if not self._challenges.is_open(request.challenge):
            raise EnrolmentError("the challenge is not open any more", code="challenge", hint="try again")
        with self._database.read() as connection:
            row = device_table.load_device(connection, request.device)
        key = VerifyKey(bytes.fromhex(row.update_key)) if row is not None else self._nobody
        if not any(self._is_late_proof(request, key, each) for each in self._authorities().fingerprints):
            raise EnrolmentError("the device's key is not proven", code="update_key")
        if not self._challenges.use(request.challenge):
            raise EnrolmentError("the challenge is not open any more", code="challenge", hint="try again")

    def _is_late_proof(self, request: LateRenewRequest, key: VerifyKey, ca_sha256: str) -> bool:
        """A device signs for an authority that it knows, which may be one that counts no more."""
        signed = late_proof_bytes(
            tenant=self._welcome.tenant,
            fleet=self._welcome.fleet,
            ca_sha256=ca_sha256,
            device=request.device,
            challenge=request.challenge,
            csr=request.csr,
        )
        try:
            key.verify(bytes.fromhex(request.proof), signed)
        except (ValueError, EnvelopeError):
            return False
        return True

    def _check_late(self, row: DeviceRow) -> None:
        """Whether a device that proved to be itself may have a certificate without showing one."""
        if row.status == REVOKED:
            raise EnrolmentError("this device was revoked", code="revoked")
        if row.status != APPROVED:
            raise EnrolmentError(
                "this device is in quarantine, and its certificate has expired", code="quarantined"
            )
        if self._clock.now() > row.certificate_not_after + self._grace_seconds:
            days = self._grace_seconds / 86_400
            raise EnrolmentError(
                f"this device's certificate expired more than {days:g} days ago", code="too_late"
            )

    # ---- both ----

    def _issue(
        self, connection: Connection, row: DeviceRow, csr: str, *, kind: str = "certificate.issued"
    ) -> Issued:
        now = self._clock.now()
        issued = self._authorities().issuing.issue_device(csr, row.device, now=now)
        device_table.insert_certificate(
            connection, row.device, issued.serial, issued=now, not_after=issued.not_after
        )
        append_audit(connection, kind, now, {"device": row.pseudonym, "serial": issued.serial})
        return issued

    def _note_refused(self, code: object, device: str, address: str, **facts: str) -> None:
        """The whole reason, for the operator only."""
        self._count("refused")
        _log.info("enrolment_refused", reason=code, device=device[:64], address=address, **facts)

    def _count(self, outcome: str) -> None:
        with self._lock:
            self._counts[outcome] += 1

    def _answer(self, row: DeviceRow, issued: Issued) -> EnrolResponse:
        kem, orders = self._online_keys()
        return EnrolResponse(
            tenant=self._welcome.tenant,
            fleet=self._welcome.fleet,
            device=row.device,
            certificate=issued.pem,
            ca=self._authorities().bundle_pem,
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
