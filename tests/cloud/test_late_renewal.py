"""A device that was away longer than its certificate: its update key lets it back in, for a while, and nobody else."""

from __future__ import annotations

import msgspec
import pytest

from cloud_server.db.audit import load_audit
from cloud_server.enrolment.authorities import only
from cloud_server.enrolment.challenges import LIFE_SECONDS, Challenges
from cloud_server.enrolment.service import EnrolmentService
from tests.cloud.deployment import NOW, Deployment, Newcomer, SteppedClock
from wire.enrolment import LateRenewRequest, late_proof_bytes
from wire.errors import EnrolmentError
from wire.primitives import SigningKey, certificate_not_after, generate_tls_key, make_csr

DAY = 86_400.0
GRACE = 90 * DAY


class Returner(Newcomer):
    """A device that was let in, and asks for its next certificate by its update key."""

    def __init__(self, deployment: Deployment, device: str = "watch-1") -> None:
        super().__init__(device)
        self._deployment = deployment
        deployment.enrolment.enrol(self.request(deployment.mint(device)))

    def late(
        self, *, key: SigningKey | None = None, signed: dict[str, str] | None = None, **sent: str
    ) -> LateRenewRequest:
        """A request; `signed` changes what the proof is over, `sent` what is sent."""
        facts = {
            "device": self.device,
            "csr": self.csr,
            "challenge": sent.get("challenge", self._deployment.enrolment.challenge().challenge),
        }
        over = {
            "tenant": "t",
            "fleet": "f",
            "ca_sha256": self._deployment.authority.fingerprint,
            **facts,
            **(signed or {}),
        }
        proof = (key or self.update_key).sign(late_proof_bytes(**over)).hex()
        return LateRenewRequest(**{**facts, "proof": proof, **sent})


@pytest.fixture
def returner(deployment: Deployment) -> Returner:
    return Returner(deployment)


def refused(deployment: Deployment, request: LateRenewRequest) -> str:
    """The code of a refusal, having checked that no certificate came of it."""
    with deployment.database.read() as connection:
        before = list(load_audit(connection))
    with pytest.raises(EnrolmentError) as caught:
        deployment.enrolment.renew_late(request)
    with deployment.database.read() as connection:
        assert list(load_audit(connection)) == before
    return str(caught.value.facts["code"])


@pytest.mark.parametrize("days_away", [0.0, 8.0, 7.0 + 90.0])
def test_unrevoked_device_gets_a_certificate_of_seven_days(
    deployment: Deployment, returner: Returner, days_away: float
) -> None:
    deployment.clock.seconds += days_away * DAY
    answer = deployment.enrolment.renew_late(returner.late())
    assert certificate_not_after(answer.certificate.encode()) == NOW + (days_away + 7) * DAY
    assert answer.ca == deployment.authority.certificate_pem
    assert deployment.registry.show("watch-1").certificate_not_after == NOW + (days_away + 7) * DAY
    assert deployment.enrolment.counts()["renewed_late"] == 1
    with deployment.database.read() as connection:
        assert [entry.kind for entry in load_audit(connection)][-1] == "certificate.issued_late"


def test_device_that_was_away_for_too_long_is_refused(deployment: Deployment, returner: Returner) -> None:
    deployment.clock.seconds += 7 * DAY + GRACE + 1
    assert refused(deployment, returner.late()) == "too_late"


def test_grace_counts_from_the_newest_certificate(deployment: Deployment, returner: Returner) -> None:
    for _ in range(3):
        deployment.clock.seconds += GRACE
        deployment.enrolment.renew_late(returner.late())


def test_grace_of_nothing_lets_no_expired_certificate_be_renewed(
    deployment: Deployment, returner: Returner
) -> None:
    strict = EnrolmentService(
        deployment.database,
        only(deployment.authority),
        deployment.enrolment._welcome,
        deployment.clock,
        tuf_root=deployment.repository.first_root,
        online_keys=deployment.keys.online_keys,
        grace_seconds=0.0,
    )
    deployment.clock.seconds += 7 * DAY + 1
    request = returner.late(challenge=strict.challenge().challenge)
    with pytest.raises(EnrolmentError) as caught:
        strict.renew_late(request)
    assert caught.value.facts["code"] == "too_late"


@pytest.mark.parametrize(("change", "code"), [("revoke", "revoked"), ("quarantine", "quarantined")])
def test_device_that_is_out_is_refused_and_told_why(
    deployment: Deployment, returner: Returner, change: str, code: str
) -> None:
    getattr(deployment.registry, change)("watch-1")
    deployment.clock.seconds += 8 * DAY
    assert refused(deployment, returner.late()) == code


def test_quarantined_device_renews_once_it_is_approved(deployment: Deployment, returner: Returner) -> None:
    deployment.registry.quarantine("watch-1")
    deployment.clock.seconds += 8 * DAY
    refused(deployment, returner.late())
    deployment.registry.approve("watch-1")
    deployment.enrolment.renew_late(returner.late())


def test_only_the_devices_own_key_proves_it(deployment: Deployment, returner: Returner) -> None:
    """Of a stranger's tries nobody learns whether a name exists, or what became of its device."""
    stranger = Returner(deployment, "stranger")
    deployment.registry.revoke("watch-1")
    assert refused(deployment, returner.late(key=stranger.update_key)) == "update_key"
    assert refused(deployment, returner.late(key=SigningKey.generate())) == "update_key"
    ghost = returner.late(signed={"device": "ghost"}, device="ghost")
    assert refused(deployment, ghost) == "update_key"
    for proof in ("", "zz", "00" * 64):
        assert refused(deployment, returner.late(proof=proof)) == "update_key"


@pytest.mark.parametrize(
    "signed",
    [{"tenant": "other"}, {"fleet": "other"}, {"ca_sha256": "0" * 64}, {"device": "other"}, {"csr": "other"}],
)
def test_proof_for_another_deployment_device_or_request_is_refused(
    deployment: Deployment, returner: Returner, signed: dict[str, str]
) -> None:
    assert refused(deployment, returner.late(signed=signed)) == "update_key"


def test_proof_over_another_challenge_is_refused(deployment: Deployment, returner: Returner) -> None:
    seen = returner.late()
    fresh = deployment.enrolment.challenge().challenge
    assert refused(deployment, msgspec.structs.replace(seen, challenge=fresh)) == "update_key"


def test_request_that_was_seen_is_worth_nothing_again(deployment: Deployment, returner: Returner) -> None:
    request = returner.late()
    deployment.enrolment.renew_late(request)
    assert refused(deployment, request) == "challenge"


def test_challenge_is_good_for_two_minutes(deployment: Deployment, returner: Returner) -> None:
    request = returner.late()
    deployment.clock.seconds += LIFE_SECONDS + 1
    assert refused(deployment, request) == "challenge"


@pytest.mark.parametrize("challenge", ["", "00", "zz", "ä", "00" * 40])
def test_challenge_that_is_not_ours_is_refused(
    deployment: Deployment, returner: Returner, challenge: str
) -> None:
    assert refused(deployment, returner.late(challenge=challenge)) == "challenge"
    foreign = Challenges(deployment.clock).make()
    assert refused(deployment, returner.late(challenge=foreign)) == "challenge"


def test_bad_request_for_a_certificate_costs_the_challenge_and_nothing_else(
    deployment: Deployment, returner: Returner
) -> None:
    other = make_csr(generate_tls_key(), "another").decode()
    assert refused(deployment, returner.late(signed={"csr": other}, csr=other)) == "csr"
    deployment.enrolment.renew_late(returner.late())


def test_wrong_signature_uses_no_challenge_up(deployment: Deployment, returner: Returner) -> None:
    request = returner.late()
    assert refused(deployment, msgspec.structs.replace(request, proof="00" * 64)) == "update_key"
    deployment.enrolment.renew_late(request)


def test_used_challenges_are_forgotten_when_they_end() -> None:
    clock = SteppedClock()
    challenges = Challenges(clock)
    for _ in range(100):
        assert challenges.use(challenges.make())
        clock.seconds += LIFE_SECONDS / 10
    assert len(challenges._used) <= 11
