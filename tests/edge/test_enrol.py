"""Enrolment against a real TLS server: one token, a pinned CA, keys that never leave, nothing half-done."""

from __future__ import annotations

import base64
import random
import select
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloud_server.enrolment.ca import CertificateAuthority
from edge_agent.cli import main
from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.enrol import (
    RENEW_AFTER_SHARE,
    enrol,
    is_expired,
    parse_token,
    renew,
    renew_late,
    renewal_is_due,
    was_refused,
)
from edge_agent.enrolment.https import HttpsConnection, exchange, identity_context
from edge_agent.enrolment.identity import Identity
from edge_agent.enrolment.patience import Patience
from edge_agent.release.fetcher import HttpsFetcher
from tests.edge.https_server import TLS_NAME, Script, https_server
from tests.edge.tiny_release import SteppedClock
from wire.backoff import Backoff, Retries
from wire.enrolment import (
    Challenge,
    EnrolmentToken,
    EnrolRequest,
    EnrolResponse,
    LateRenewRequest,
    OnlineKey,
    Refusal,
    RenewRequest,
    RenewResponse,
    decode_json,
    encode_json,
    late_proof_bytes,
    proof_bytes,
)
from wire.errors import ConfigurationError, EnrolmentError, PeerError, TransportError, TrustError
from wire.primitives import (
    VerifyKey,
    certificate_fingerprint,
    certificate_not_after,
    certificate_validity,
    make_csr,
    read_private,
    write_private,
)

NOW = time.time()
DAY = 86_400.0
CLOCK = SteppedClock(NOW)


class Aggregator:
    """Answers enrolments as the cloud does, and remembers what it was asked."""

    def __init__(self, authority: CertificateAuthority) -> None:
        self.authority = authority
        self.requests: list[EnrolRequest] = []
        self.script = Script(files={"/v1/ca": authority.certificate_pem.encode()})
        self.script.post = {
            "/v1/enroll": self.enrol,
            "/v1/renew": self.renew,
            "/v1/challenge": lambda *_: (200, encode_json(Challenge(challenge="ab" * 20))),
            "/v1/late-renewal": self.renew_late,
        }
        self.url = ""
        self.changes: dict[str, str] = {}

    def enrol(self, body: bytes, client: str) -> tuple[int, bytes]:
        request = decode_json(body, EnrolRequest)
        self.requests.append(request)
        VerifyKey(bytes.fromhex(request.update_key)).verify(
            bytes.fromhex(request.proof), proof_bytes(request.token_id, request.device, request.csr)
        )
        issued = self.authority.issue_device(request.csr, request.device, now=NOW)
        answer = {
            "tenant": "tenant",
            "fleet": "fleet",
            "device": request.device,
            "certificate": issued.pem,
            "ca": self.authority.certificate_pem,
            "tuf_root": '{"signed":{}}',
            "kem": (OnlineKey(id="00" * 8, algorithm="x25519", public="ab" * 32),),
            "orders": (OnlineKey(id="11" * 8, public="cd" * 32),),
            "tls_name": TLS_NAME,
            "device_url": self.url,
            "broker_url": "mqtt://127.0.0.1:1883",
            **self.changes,
        }
        return 200, encode_json(EnrolResponse(**answer))

    def renew(self, body: bytes, client: str) -> tuple[int, bytes]:
        request = decode_json(body, RenewRequest)
        issued = self.authority.issue_device(request.csr, client, now=NOW + 60)
        return 200, encode_json(RenewResponse(certificate=issued.pem, ca=self.authority.certificate_pem))

    def renew_late(self, body: bytes, client: str) -> tuple[int, bytes]:
        assert client == ""  # no certificate was shown
        request = decode_json(body, LateRenewRequest)
        signed = late_proof_bytes(
            tenant="tenant",
            fleet="fleet",
            ca_sha256=self.authority.fingerprint,
            device="device-1",
            challenge="ab" * 20,
            csr=request.csr,
        )
        key = VerifyKey(bytes.fromhex(self.requests[0].update_key))
        key.verify(bytes.fromhex(request.proof), signed)
        issued = self.authority.issue_device(request.csr, request.device, now=NOW)
        return 200, encode_json(RenewResponse(certificate=issued.pem, ca=self.authority.certificate_pem))

    def refuse(self, code: str, status: int = 403) -> None:
        refusal = encode_json(Refusal(error=code, message="no entry"))
        self.script.post["/v1/enroll"] = lambda body, client: (status, refusal)

    def token(self, **changes: object) -> str:
        parts: dict[str, object] = {
            "url": self.url,
            "tls_name": TLS_NAME,
            "ca_sha256": self.authority.fingerprint,
            "token_id": "ab" * 8,
            "secret": "s" * 43,
            "device": "device-1",
            "expires": int(NOW) + 3600,
            **changes,
        }
        return str(EnrolmentToken(**parts))


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    authority = CertificateAuthority.create(tmp_path / "ca", name="test CA", now=NOW)
    aggregator = Aggregator(authority)
    with https_server(tmp_path / "server", authority, aggregator.script, now=NOW) as url:
        aggregator.url = url
        yield aggregator


def test_device_enrols_with_one_token(tmp_path: Path, aggregator: Aggregator) -> None:
    identity = enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    assert (identity.tenant, identity.fleet, identity.device) == ("tenant", "fleet", "device-1")
    assert (identity.mqtt_host, identity.mqtt_port, identity.mqtt_tls) == ("127.0.0.1", 1883, False)
    assert identity.tuf_root == b'{"signed":{}}'
    (request,) = aggregator.requests
    assert request.update_key == identity.update_key.public_bytes.hex()
    loaded = identity_files.load(tmp_path / "state")
    assert replace(loaded, update_key=identity.update_key) == identity
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["identity"]


def test_private_keys_never_leave_the_device(tmp_path: Path, aggregator: Aggregator) -> None:
    identity = enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    sent = encode_json(aggregator.requests[0])
    assert identity.update_key.private_bytes().hex().encode() not in sent
    assert b"PRIVATE" not in sent
    assert b"PRIVATE" in read_private(identity.tls_key_path)


def test_issued_certificate_opens_the_port_with_mutual_tls(tmp_path: Path, aggregator: Aggregator) -> None:
    identity = enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    script = Script(files={"/metadata/timestamp.json": b"{}"})
    with https_server(tmp_path / "b", aggregator.authority, script, now=NOW, wants_client=True) as url:
        fetcher = HttpsFetcher(replace(identity, url_api=url))
        assert b"".join(fetcher.fetch("/metadata/timestamp.json", limit_bytes=100)) == b"{}"
        fetcher.close()


def test_name_comes_from_the_command_when_the_token_leaves_it_open(
    tmp_path: Path, aggregator: Aggregator
) -> None:
    token = aggregator.token(device="")
    with pytest.raises(EnrolmentError) as caught:
        enrol(token, tmp_path / "state", clock=CLOCK)
    assert "--name" in caught.value.hint
    assert enrol(token, tmp_path / "state", name="camera-7", clock=CLOCK).device == "camera-7"


@pytest.mark.parametrize("name", ["other", "a/b", "#", "x" * 65, "ö"])
def test_name_that_the_token_or_a_topic_forbids_is_refused_before_anything_is_sent(
    tmp_path: Path, aggregator: Aggregator, name: str
) -> None:
    with pytest.raises(EnrolmentError):
        enrol(aggregator.token(), tmp_path / "state", name=name, clock=CLOCK)
    assert aggregator.script.connections == 0


def test_wrong_pin_sends_nothing(tmp_path: Path, aggregator: Aggregator) -> None:
    with pytest.raises(EnrolmentError, match="pins"):
        enrol(aggregator.token(ca_sha256="0" * 64), tmp_path / "state", clock=CLOCK)
    assert [method for method, _, _ in aggregator.script.requests] == ["GET"]
    assert not (tmp_path / "state").exists()


def test_somebody_in_between_who_shows_the_true_ca_is_not_sent_the_secret(
    tmp_path: Path, aggregator: Aggregator
) -> None:
    """It can pass the CA certificate on, but has no server certificate of that CA."""
    impostor = CertificateAuthority.create(tmp_path / "impostor", name="test CA", now=NOW)
    script = Script(files=dict(aggregator.script.files), post=aggregator.script.post)
    with https_server(tmp_path / "between", impostor, script, now=NOW) as url:
        with pytest.raises(TrustError):
            enrol(aggregator.token(url=url), tmp_path / "state", clock=CLOCK)
        assert [method for method, _, _ in script.requests] == ["GET"]
    assert aggregator.requests == []


def test_another_server_of_the_same_ca_is_not_sent_the_secret(tmp_path: Path, aggregator: Aggregator) -> None:
    script = Script(files=dict(aggregator.script.files), post=aggregator.script.post)
    server = https_server(tmp_path / "x", aggregator.authority, script, now=NOW, names=("printer.test",))
    with server as url, pytest.raises(TrustError):
        enrol(aggregator.token(url=url), tmp_path / "state", clock=CLOCK)
    assert aggregator.requests == []


@pytest.mark.parametrize(
    "code",
    [
        "token",
        "token_used",
        "token_expired",
        "name",
        "name_taken",
        "csr",
        "update_key",
        "revoked",
        "quarantined",
        "too_late",
        "busy",
        "?",
    ],
)
def test_refusal_names_its_reason_and_leaves_no_identity(
    tmp_path: Path, aggregator: Aggregator, code: str
) -> None:
    aggregator.refuse(code)
    with pytest.raises(EnrolmentError) as caught:
        enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    assert caught.value.facts["code"] == code
    assert "no entry" in str(caught.value)
    assert not (tmp_path / "state" / "identity").exists()
    assert bool(list((tmp_path / "state").glob(".enrolling-*"))) == (code == "busy")


def test_expired_token_is_refused_here(tmp_path: Path, aggregator: Aggregator) -> None:
    with pytest.raises(EnrolmentError, match="expired"):
        enrol(aggregator.token(expires=int(NOW) - 1), tmp_path / "state", clock=CLOCK)
    assert aggregator.script.connections == 0


def test_lost_answer_is_asked_for_again_with_the_same_keys(tmp_path: Path, aggregator: Aggregator) -> None:
    aggregator.script.cut_after = [10_000, 100]
    with pytest.raises(TransportError, match="early"):
        enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    assert not (tmp_path / "state" / "identity").exists()
    enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    first, second = aggregator.requests
    assert first == second
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["identity"]


def test_other_token_gets_other_keys(tmp_path: Path, aggregator: Aggregator) -> None:
    aggregator.refuse("busy", 503)
    with pytest.raises(EnrolmentError):
        enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    aggregator.script.post["/v1/enroll"] = aggregator.enrol
    (kept,) = (tmp_path / "state").glob(".enrolling-*")
    before = read_private(kept / "tls.key")
    identity = enrol(aggregator.token(token_id="cd" * 8), tmp_path / "state", clock=CLOCK)
    assert read_private(identity.tls_key_path) != before


def test_enrolled_device_does_not_enrol_again(tmp_path: Path, aggregator: Aggregator) -> None:
    enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    with pytest.raises(ConfigurationError, match="already"):
        enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    assert len(aggregator.requests) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "device-2"},
        {"broker_url": "http://127.0.0.1:80"},
        {"device_url": "ftp://127.0.0.1:80"},
        {"ca": "-----BEGIN CERTIFICATE-----\nbm8=\n-----END CERTIFICATE-----\n"},
    ],
)
def test_answer_that_cannot_be_used_leaves_no_identity(
    tmp_path: Path, aggregator: Aggregator, changes: dict[str, str]
) -> None:
    aggregator.changes = changes
    with pytest.raises(TrustError):
        enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    assert not (tmp_path / "state" / "identity").exists()


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"\xff", b"{" * 100_000, b"x" * 1_000_000])
@pytest.mark.parametrize("status", [200, 403])
def test_nonsense_in_the_answer_is_an_error_of_ours(
    tmp_path: Path, aggregator: Aggregator, body: bytes, status: int
) -> None:
    aggregator.script.post["/v1/enroll"] = lambda *_: (status, body)
    with pytest.raises((EnrolmentError, PeerError)):
        enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)


@pytest.mark.parametrize(
    "ca", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"]
)
def test_nonsense_instead_of_the_ca_is_an_error_of_ours(
    tmp_path: Path, aggregator: Aggregator, ca: bytes
) -> None:
    aggregator.script.files["/v1/ca"] = ca
    with pytest.raises(EnrolmentError, match="pins"):
        enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)


def test_nobody_there_says_so(tmp_path: Path, aggregator: Aggregator) -> None:
    with pytest.raises(TransportError) as caught:
        enrol(aggregator.token(url="https://127.0.0.1:9"), tmp_path / "state", clock=CLOCK)
    assert "aggregator" in caught.value.hint


def patient(seconds: float, pauses: list[float]) -> Patience:
    """On a clock that only its own waits move."""

    class Clock:
        def now(self) -> float:
            return NOW

        def monotonic(self) -> float:
            return sum(pauses)

    return Patience(seconds, Retries(Backoff(), random.Random(2)), Clock(), pause=pauses.append)


def test_aggregator_that_is_busy_is_asked_again_when_it_said(tmp_path: Path, aggregator: Aggregator) -> None:
    enrolled, refusals = aggregator.script.post["/v1/enroll"], [503, 429]
    busy = encode_json(Refusal(error="busy", message="later"))
    aggregator.script.retry_after = "7"
    aggregator.script.post["/v1/enroll"] = lambda body, client: (
        (refusals.pop(), busy) if refusals else enrolled(body, client)
    )
    pauses: list[float] = []
    identity = enrol(aggregator.token(), tmp_path, clock=CLOCK, patience=patient(60.0, pauses))
    assert identity.device == "device-1"
    assert len(pauses) == 2
    assert all(7.0 <= pause <= 14.0 for pause in pauses)


def test_patience_has_an_end_and_is_for_what_may_mend_only(tmp_path: Path, aggregator: Aggregator) -> None:
    pauses: list[float] = []
    nowhere = aggregator.token(url="https://127.0.0.1:9")
    with pytest.raises(TransportError):
        enrol(nowhere, tmp_path, clock=CLOCK, patience=patient(300.0, pauses))
    assert 100.0 < sum(pauses) <= 300.0
    aggregator.refuse("token_used")
    tried = len(pauses)
    with pytest.raises(EnrolmentError):
        enrol(aggregator.token(), tmp_path, clock=CLOCK, patience=patient(300.0, pauses))
    assert len(pauses) == tried


@pytest.mark.parametrize(
    "text",
    [
        "",
        "shoal1.",
        "shoal1.e30",
        "shoal2.e30",
        "shoal1.!!!",
        "shoal1." + base64.urlsafe_b64encode(b'{"u":1}').decode(),
        "shoal1." + "A" * 5000,
    ],
)
def test_text_that_is_no_token_is_refused_with_a_hint(tmp_path: Path, text: str) -> None:
    with pytest.raises(EnrolmentError) as caught:
        enrol(text, tmp_path / "state", clock=CLOCK)
    assert caught.value.hint
    assert not (tmp_path / "state").exists()


def test_token_survives_being_pasted(aggregator: Aggregator) -> None:
    token = aggregator.token()
    assert str(parse_token(f"  {token}\n")) == token


def test_renewal_brings_a_later_certificate_for_the_same_key(tmp_path: Path, aggregator: Aggregator) -> None:
    identity = enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    begins, ends = certificate_validity(identity.certificate_pem)
    due = begins + RENEW_AFTER_SHARE * (ends - begins)
    assert not renewal_is_due(identity, due - 1)
    assert renewal_is_due(identity, due)
    assert renewal_is_due(identity, ends + 1)
    with https_server(
        tmp_path / "b", aggregator.authority, aggregator.script, now=NOW, wants_client=True
    ) as url:
        renewed = renew(replace(identity, url_api=url))
    assert certificate_not_after(renewed.certificate_pem) > ends
    assert identity_files.load(tmp_path / "state").certificate_pem == renewed.certificate_pem
    assert renewed.update_key is identity.update_key


def test_renewal_keeps_the_certificate_when_the_answer_cannot_be_used(
    tmp_path: Path, aggregator: Aggregator
) -> None:
    identity = enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    other = CertificateAuthority.create(tmp_path / "other", name="other", now=NOW)
    answers = {
        "another CA": lambda csr: (other.issue_device(csr, "device-1", now=NOW).pem, other.certificate_pem),
        "ends earlier": lambda csr: (
            aggregator.authority.issue_device(csr, "device-1", now=NOW, days=1).pem,
            aggregator.authority.certificate_pem,
        ),
        "cannot read": lambda csr: ("", ""),
    }
    with https_server(
        tmp_path / "b", aggregator.authority, aggregator.script, now=NOW, wants_client=True
    ) as url:
        for answer in answers.values():

            def respond(body: bytes, client: str, answer=answer) -> tuple[int, bytes]:  # type: ignore[no-untyped-def]
                certificate, ca = answer(decode_json(body, RenewRequest).csr)
                return 200, encode_json(RenewResponse(certificate=certificate, ca=ca))

            aggregator.script.post["/v1/renew"] = respond
            with pytest.raises(TrustError):
                renew(replace(identity, url_api=url))
    assert identity_files.load(tmp_path / "state").certificate_pem == identity.certificate_pem


def test_revoked_device_is_told_to_enrol_anew(tmp_path: Path, aggregator: Aggregator) -> None:
    identity = enrol(aggregator.token(), tmp_path / "state", clock=CLOCK)
    refusal = encode_json(Refusal(error="revoked", message="gone"))
    aggregator.script.post["/v1/renew"] = lambda body, client: (403, refusal)
    server = https_server(tmp_path / "b", aggregator.authority, aggregator.script, now=NOW, wants_client=True)
    with server as url, pytest.raises(EnrolmentError) as caught:
        renew(replace(identity, url_api=url))
    assert "enrol it anew" in caught.value.hint
    assert certificate_fingerprint(identity.certificate_pem)


def expired(folder: Path, aggregator: Aggregator) -> Identity:
    """A device whose certificate ended a day ago."""
    identity = enrol(aggregator.token(), folder, clock=CLOCK)
    csr = make_csr(read_private(identity.tls_key_path), identity.device).decode()
    issued = aggregator.authority.issue_device(csr, identity.device, now=NOW - 8 * DAY)
    identity.certificate_path.write_text(issued.pem)
    return identity_files.load(folder)


def test_expired_certificate_is_renewed_by_the_update_key(tmp_path: Path, aggregator: Aggregator) -> None:
    identity = expired(tmp_path / "state", aggregator)
    assert is_expired(identity, NOW)
    renewed = renew_late(identity)
    assert not is_expired(renewed, NOW)
    assert identity_files.load(tmp_path / "state").certificate_pem == renewed.certificate_pem
    assert (renewed.update_key, renewed.device) == (identity.update_key, "device-1")


def test_server_that_sees_our_certificate_expired_is_believed(tmp_path: Path, aggregator: Aggregator) -> None:
    """The device's own clock may be behind: then only the other side knows."""
    identity = expired(tmp_path / "state", aggregator)
    with (
        https_server(
            tmp_path / "b", aggregator.authority, aggregator.script, now=NOW, wants_client=True
        ) as url,
        pytest.raises(TransportError) as caught,
    ):
        renew(replace(identity, url_api=url))
    assert was_refused(caught.value)
    with pytest.raises(TransportError) as nobody:
        renew(replace(identity, url_api="https://127.0.0.1:9"))
    assert not was_refused(nobody.value)


def test_reason_of_a_server_that_was_gone_before_we_wrote_is_read(
    tmp_path: Path, aggregator: Aggregator
) -> None:
    identity = expired(tmp_path / "state", aggregator)
    with https_server(
        tmp_path / "b", aggregator.authority, aggregator.script, now=NOW, wants_client=True
    ) as url:
        connection = HttpsConnection(url, tls_name=identity.tls_name, context=identity_context(identity))
        connection.connect()
        # Tickets of the session and the alert may come apart; the end of the stream comes last.
        poll = select.poll()
        poll.register(connection.sock, select.POLLRDHUP)
        assert poll.poll(10_000)
        with pytest.raises(TransportError) as caught:
            exchange(connection, "POST", "/v1/renew", bytes(100_000), limit_bytes=1000)
    assert was_refused(caught.value)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("revoked", "another name"),
        ("quarantined", "device approve"),
        ("too_late", "revoke it"),
        ("challenge", ""),
    ],
)
def test_late_renewal_that_is_refused_says_what_to_do_and_keeps_the_certificate(
    tmp_path: Path, aggregator: Aggregator, code: str, hint: str
) -> None:
    identity = expired(tmp_path / "state", aggregator)
    refusal = encode_json(Refusal(error=code, message="no entry"))
    aggregator.script.post["/v1/late-renewal"] = lambda *_: (403, refusal)
    with pytest.raises(EnrolmentError) as caught:
        renew_late(identity)
    assert caught.value.facts["code"] == code
    assert hint in caught.value.hint
    assert identity_files.load(tmp_path / "state").certificate_pem == identity.certificate_pem


def test_late_renewal_with_another_ca_sends_nothing(tmp_path: Path, aggregator: Aggregator) -> None:
    identity = expired(tmp_path / "state", aggregator)
    other = CertificateAuthority.create(tmp_path / "other", name="other", now=NOW)
    with (
        https_server(tmp_path / "c", other, aggregator.script, now=NOW) as url,
        pytest.raises(TrustError),
    ):
        renew_late(replace(identity, url_enrol=url))
    assert is_expired(identity_files.load(tmp_path / "state"), NOW)


def test_device_that_an_operator_must_approve_says_so(
    tmp_path: Path, aggregator: Aggregator, capsys: pytest.CaptureFixture[str]
) -> None:
    aggregator.changes = {"status": "quarantined"}
    token = tmp_path / "token"
    write_private(token, aggregator.token(expires=2**40).encode())
    assert main(["enroll", "--token-file", str(token), "--state", str(tmp_path / "state")]) == 0
    assert "shoal-cloud device approve device-1" in capsys.readouterr().err
    assert not identity_files.load(tmp_path / "state").is_waiting
