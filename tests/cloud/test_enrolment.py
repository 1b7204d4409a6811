"""Enrolment and renewal: who gets in, who does not, and that a refusal leaves nothing behind."""

from __future__ import annotations

import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloud_server.db.audit import load_audit, verify_audit
from cloud_server.db.tokens import load_token
from cloud_server.enrolment.ca import CertificateAuthority, ensure_server_files
from cloud_server.enrolment.tokens import MAX_LIFE_SECONDS
from tests.cloud.deployment import NOW, Deployment, Newcomer
from wire.enrolment import EnrolmentToken, EnrolRequest, RenewRequest
from wire.errors import ConfigurationError, EnrolmentError
from wire.primitives import SigningKey, certificate_not_after, generate_tls_key, make_csr

DAY = 86_400.0


def refusal(deployment: Deployment, request: EnrolRequest) -> str:
    """The code of a refusal, having checked that it left nothing."""
    before = deployment.registry.devices()
    with deployment.database.read() as connection:
        entries = list(load_audit(connection))
    with pytest.raises(EnrolmentError) as caught:
        deployment.enrolment.enrol(request)
    with deployment.database.read() as connection:
        assert list(load_audit(connection)) == entries
    assert deployment.registry.devices() == before
    return str(caught.value.facts["code"])


def test_device_is_let_in_with_all_it_needs(deployment: Deployment) -> None:
    newcomer = Newcomer("watch-1")
    answer = deployment.enrolment.enrol(newcomer.request(deployment.mint("watch-1")))
    assert (answer.tenant, answer.fleet, answer.device, answer.status) == ("t", "f", "watch-1", "approved")
    assert answer.tuf_root.encode() == deployment.repository.first_root()
    assert answer.kem[0].public == deployment.keys.kem[0].public_key.public_bytes.hex()
    assert answer.orders[0].public == deployment.keys.order.public_bytes.hex()
    row = deployment.registry.show("watch-1")
    assert row.update_key == newcomer.update_key.public_bytes.hex()
    assert row.max_examples == answer.max_examples == 500
    assert deployment.registry.signers()[newcomer.update_key.key_id].device == "watch-1"


def test_certificate_names_the_device_for_seven_days(deployment: Deployment) -> None:
    answer = deployment.enrolment.enrol(Newcomer("watch-1").request(deployment.mint()))
    certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    assert certificate.subject.rfc4514_string() == "CN=watch-1"
    assert certificate_not_after(answer.certificate.encode()) == NOW + 7 * DAY
    assert deployment.registry.show("watch-1").certificate_serial == f"{certificate.serial_number:x}"
    authority = x509.load_pem_x509_certificate(answer.ca.encode())
    certificate.verify_directly_issued_by(authority)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_secret_is_kept_as_a_hash_only(deployment: Deployment) -> None:
    token = deployment.mint()
    with deployment.database.read() as connection:
        row = load_token(connection, token.token_id)
        dump = str(connection.exec_driver_sql("SELECT * FROM tokens").all())
    assert row is not None
    assert token.secret not in dump
    assert row.secret_hash != hashlib.sha256(token.secret.encode()).hexdigest()


def test_token_of_many_uses_lets_so_many_in_to_wait_for_approval(deployment: Deployment) -> None:
    token = deployment.mint(uses=2)
    for name in ("a", "b"):
        assert deployment.enrolment.enrol(Newcomer(name).request(token)).status == "quarantined"
        assert deployment.registry.show(name).reason == "waiting for approval"
    assert refusal(deployment, Newcomer("c").request(token)) == "token_used"
    deployment.registry.approve("a")
    assert deployment.registry.status("a") == "approved"


def test_device_whose_answer_was_lost_is_answered_again(deployment: Deployment) -> None:
    newcomer, token = Newcomer("watch-1"), deployment.mint("watch-1")
    first = deployment.enrolment.enrol(newcomer.request(token))
    second = deployment.enrolment.enrol(newcomer.request(token))
    assert second.certificate != first.certificate
    assert len(deployment.registry.devices()) == 1


def test_revoked_device_is_not_let_in_by_its_old_token(deployment: Deployment) -> None:
    newcomer, token = Newcomer("watch-1"), deployment.mint("watch-1")
    deployment.enrolment.enrol(newcomer.request(token))
    deployment.registry.revoke("watch-1")
    assert refusal(deployment, newcomer.request(token)) == "token_used"


@pytest.mark.parametrize("secret", ["", "A" * 43, "!!", "ä", "=" * 40])
def test_wrong_secret_is_refused(deployment: Deployment, secret: str) -> None:
    token = deployment.mint()
    assert refusal(deployment, Newcomer("a").request(token, secret=secret)) == "token"


def test_foreign_token_is_refused_as_a_wrong_secret_is(deployment: Deployment) -> None:
    token = deployment.mint()
    assert refusal(deployment, Newcomer("a").request(token, token_id="0" * 16)) in {"token", "update_key"}
    foreign = EnrolmentToken(
        url=token.url,
        tls_name=token.tls_name,
        ca_sha256=token.ca_sha256,
        token_id="0" * 16,
        secret=token.secret,
        device="",
        expires=token.expires,
    )
    assert refusal(deployment, Newcomer("a").request(foreign)) == "token"


def test_expired_token_is_refused(deployment: Deployment) -> None:
    token = deployment.mint(life_seconds=60.0)
    deployment.clock.seconds += 61
    assert refusal(deployment, Newcomer("a").request(token)) == "token_expired"


def test_token_that_expired_long_ago_is_forgotten(deployment: Deployment) -> None:
    old = deployment.mint()
    deployment.clock.seconds += 92 * DAY
    deployment.mint()
    assert refusal(deployment, Newcomer("a").request(old)) == "token"


def test_token_for_another_name_is_refused(deployment: Deployment) -> None:
    assert refusal(deployment, Newcomer("b").request(deployment.mint("a"))) == "name"


def test_taken_name_is_refused(deployment: Deployment) -> None:
    deployment.enrolment.enrol(Newcomer("a").request(deployment.mint()))
    assert refusal(deployment, Newcomer("a").request(deployment.mint())) == "name_taken"


@pytest.mark.parametrize("name", ["a/b", "a+", "#", "x" * 65, "ü", "a b", ""])
def test_bad_name_is_refused(deployment: Deployment, name: str) -> None:
    request = Newcomer("good").request(deployment.mint(), device=name)
    assert refusal(deployment, request) == "name"


def test_update_key_of_somebody_else_is_refused(deployment: Deployment) -> None:
    victim = Newcomer("victim")
    deployment.enrolment.enrol(victim.request(deployment.mint()))
    thief = Newcomer("thief")
    stolen = victim.update_key.public_bytes.hex()
    assert refusal(deployment, thief.request(deployment.mint(), update_key=stolen)) == "update_key"
    thief.update_key = victim.update_key
    assert refusal(deployment, thief.request(deployment.mint())) == "update_key"


@pytest.mark.parametrize(
    "changes",
    [{"update_key": "zz"}, {"update_key": "00"}, {"proof": ""}, {"proof": "00" * 64}, {"proof": "x"}],
)
def test_malformed_update_key_or_proof_is_refused(deployment: Deployment, changes: dict[str, str]) -> None:
    assert refusal(deployment, Newcomer("a").request(deployment.mint(), **changes)) == "update_key"


def _p256_csr(name: str) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _forged_csr(name: str) -> str:
    """A request whose signature does not fit: somebody else's public key."""
    request = x509.load_pem_x509_csr(make_csr(generate_tls_key(), name))
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der))
    return forged.public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize("kind", ["", "text", "other_name", "p256", "forged"])
def test_bad_certificate_request_is_refused(deployment: Deployment, kind: str) -> None:
    requests = {
        "": lambda: "",
        "text": lambda: "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        "other_name": lambda: make_csr(generate_tls_key(), "b").decode(),
        "p256": lambda: _p256_csr("a"),
        "forged": lambda: _forged_csr("a"),
    }
    assert refusal(deployment, Newcomer("a").request(deployment.mint(), csr=requests[kind]())) == "csr"


def test_refused_request_costs_no_use_of_the_token(deployment: Deployment) -> None:
    token = deployment.mint()
    refusal(deployment, Newcomer("a").request(token, csr=""))
    deployment.enrolment.enrol(Newcomer("a").request(token))


@pytest.mark.parametrize(
    "options",
    [
        {"uses": 0},
        {"uses": 10**6},
        {"device": "a/b"},
        {"device": "a", "uses": 2},
        {"life_seconds": 0.0},
        {"life_seconds": MAX_LIFE_SECONDS + 1},
    ],
)
def test_token_with_bad_bounds_is_never_minted(deployment: Deployment, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        deployment.mint(**options)  # type: ignore[arg-type]
    with deployment.database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM tokens").scalar_one() == 0


def test_renewal_gives_a_later_certificate(deployment: Deployment) -> None:
    newcomer = Newcomer("watch-1")
    first = deployment.enrolment.enrol(newcomer.request(deployment.mint()))
    serial = deployment.registry.show("watch-1").certificate_serial
    deployment.clock.seconds += 5 * DAY
    renewed = deployment.enrolment.renew("watch-1", serial, RenewRequest(csr=newcomer.csr))
    assert certificate_not_after(renewed.certificate.encode()) == NOW + 12 * DAY
    assert renewed.certificate != first.certificate
    # The answer may have been lost: the older certificate still renews.
    deployment.enrolment.renew("watch-1", serial, RenewRequest(csr=newcomer.csr))


def test_renewal_of_a_revoked_or_foreign_certificate_is_refused(deployment: Deployment) -> None:
    newcomer = Newcomer("watch-1")
    deployment.enrolment.enrol(newcomer.request(deployment.mint()))
    serial = deployment.registry.show("watch-1").certificate_serial
    request = RenewRequest(csr=newcomer.csr)
    for device, shown in (("watch-1", "abc"), ("other", serial)):
        with pytest.raises(EnrolmentError):
            deployment.enrolment.renew(device, shown, request)
    with pytest.raises(EnrolmentError) as caught:
        deployment.enrolment.renew(
            "watch-1", serial, RenewRequest(csr=make_csr(generate_tls_key(), "b").decode())
        )
    assert caught.value.facts["code"] == "csr"
    deployment.registry.revoke("watch-1")
    with pytest.raises(EnrolmentError) as caught:
        deployment.enrolment.renew("watch-1", serial, request)
    assert caught.value.facts["code"] == "revoked"


def test_every_enrolment_is_in_the_audit_chain(deployment: Deployment) -> None:
    deployment.enrolment.enrol(Newcomer("watch-1").request(deployment.mint()))
    with deployment.database.read() as connection:
        assert verify_audit(connection) == 2
        entries = list(load_audit(connection))
    assert [entry.kind for entry in entries] == ["device.enrolled", "certificate.issued"]
    assert all("watch-1" not in entry.body for entry in entries)


def test_revocation_list_names_revoked_certificates(deployment: Deployment) -> None:
    pem = deployment.authority.revocation_list(["ab12", "1"], issued=NOW)
    revoked = x509.load_pem_x509_crl(pem)
    assert {entry.serial_number for entry in revoked} == {0xAB12, 1}
    authority = x509.load_pem_x509_certificate(deployment.authority.certificate_pem.encode())
    assert revoked.next_update_utc == authority.not_valid_after_utc
    assert revoked.is_signature_valid(authority.public_key())  # type: ignore[arg-type]


def test_ca_is_made_once_and_read_again(deployment: Deployment, tmp_path: object) -> None:
    folder = tmp_path / "ca"  # type: ignore[operator]
    assert CertificateAuthority.load(folder).fingerprint == deployment.authority.fingerprint
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    with pytest.raises(ConfigurationError, match="already"):
        CertificateAuthority.create(folder, name="again", now=NOW)


def test_ca_with_another_key_is_refused(deployment: Deployment) -> None:
    with pytest.raises(ConfigurationError, match="belong together"):
        CertificateAuthority(generate_tls_key(), deployment.authority.certificate_pem.encode())


def test_server_files_are_made_once_and_anew_for_new_names(deployment: Deployment, tmp_path: object) -> None:
    folder = tmp_path / "ca"  # type: ignore[operator]

    def serial(names: list[str], now: float) -> int:
        path, _ = ensure_server_files(deployment.authority, folder, "server", names, now=now)
        return x509.load_pem_x509_certificate(path.read_bytes()).serial_number

    first = serial(["cloud.shoal", "127.0.0.1"], NOW)
    assert serial(["cloud.shoal", "127.0.0.1"], NOW) == first
    second = serial(["cloud.shoal", "::1"], NOW)
    assert second != first
    assert serial(["cloud.shoal", "::1"], NOW + 800 * DAY) != second


def test_unsigned_update_key_cannot_be_registered_by_replaying_a_proof(deployment: Deployment) -> None:
    """A proof that was seen for one token and name is worth nothing for another."""
    victim = Newcomer("victim")
    seen = victim.request(deployment.mint())
    thief = Newcomer("thief")
    request = thief.request(deployment.mint(), update_key=seen.update_key, proof=seen.proof)
    assert refusal(deployment, request) == "update_key"
    assert SigningKey.generate().public_bytes.hex() != seen.update_key
