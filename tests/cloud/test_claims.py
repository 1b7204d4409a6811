"""Who may claim a token, under which name, and what happens when two parties have the same one."""

from __future__ import annotations

import pytest

from cloud_server.db.audit import load_audit, verify_audit
from cloud_server.enrolment.queue import CLAIMED_TWICE, is_claimed_twice, is_pending
from cloud_server.enrolment.tokens import free_names
from tests.cloud.deployment import Deployment, Newcomer
from wire.enrolment import EnrolRequest
from wire.errors import ConfigurationError, EnrolmentError


def refused(deployment: Deployment, request: EnrolRequest) -> str:
    """The code of a refusal."""
    with pytest.raises(EnrolmentError) as caught:
        deployment.enrolment.enrol(request)
    return str(caught.value.facts["code"])


def kinds(deployment: Deployment) -> list[str]:
    with deployment.database.read() as connection:
        verify_audit(connection)
        return [entry.kind for entry in load_audit(connection)]


def test_second_claim_of_a_one_use_token_quarantines_the_first_claimant_and_is_refused(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    token = deployment.mint()
    thief = Newcomer("thief")
    deployment.enrolment.enrol(thief.request(token))
    assert refused(deployment, Newcomer("honest").request(token)) == "token_used"
    row = deployment.registry.show("thief")
    assert (row.status, row.reason) == ("quarantined", CLAIMED_TWICE)
    assert is_claimed_twice(row)
    assert deployment.registry.status("honest") == ""
    assert kinds(deployment)[-2:] == ["token.claimed_twice", "device.quarantined"]
    assert deployment.enrolment.counts()["claimed_twice"] == 1
    assert [record.levelname for record in caplog.records if "claimed_twice" in record.getMessage()] == [
        "WARNING"
    ]


def test_second_claim_under_the_same_name_with_another_key_is_one_too(deployment: Deployment) -> None:
    token = deployment.mint("cam")
    deployment.enrolment.enrol(Newcomer("cam").request(token))
    assert refused(deployment, Newcomer("cam").request(token)) == "token_used"
    assert deployment.registry.show("cam").reason == CLAIMED_TWICE


def test_second_claim_after_the_tokens_end_is_one_too(deployment: Deployment) -> None:
    token = deployment.mint(life_seconds=60.0)
    deployment.enrolment.enrol(Newcomer("first").request(token))
    deployment.clock.seconds += 3600.0
    assert refused(deployment, Newcomer("second").request(token)) == "token_used"
    assert deployment.registry.status("first") == "quarantined"


def test_first_claimant_that_repeats_itself_raises_no_alarm(deployment: Deployment) -> None:
    first, token = Newcomer("first"), deployment.mint(life_seconds=60.0)
    deployment.enrolment.enrol(first.request(token))
    deployment.enrolment.enrol(first.request(token))
    deployment.clock.seconds += 3600.0
    assert refused(deployment, first.request(token)) == "token_expired"
    assert deployment.registry.status("first") == "approved"
    deployment.registry.revoke("first")
    assert refused(deployment, first.request(token)) == "token_used"
    assert "token.claimed_twice" not in kinds(deployment)


def test_wrong_secret_of_a_spent_token_raises_no_alarm(deployment: Deployment) -> None:
    """Whoever saw a token's number and not its secret shuts nobody out."""
    token = deployment.mint()
    deployment.enrolment.enrol(Newcomer("first").request(token))
    assert refused(deployment, Newcomer("second").request(token, secret="A" * 43)) == "token"
    assert deployment.registry.status("first") == "approved"


def test_token_alarms_once_so_that_an_approved_device_stays_approved(deployment: Deployment) -> None:
    token = deployment.mint()
    deployment.enrolment.enrol(Newcomer("first").request(token))
    refused(deployment, Newcomer("second").request(token))
    deployment.registry.approve("first")
    assert refused(deployment, Newcomer("third").request(token)) == "token_used"
    assert deployment.registry.status("first") == "approved"
    assert kinds(deployment).count("token.claimed_twice") == 1


def test_second_claim_leaves_a_revoked_device_revoked_and_keeps_other_reasons(deployment: Deployment) -> None:
    revoked, waiting = deployment.mint(), deployment.mint(approves=False)
    deployment.enrolment.enrol(Newcomer("gone").request(revoked))
    deployment.enrolment.enrol(Newcomer("waits").request(waiting))
    deployment.registry.revoke("gone", "stolen")
    refused(deployment, Newcomer("x").request(revoked))
    refused(deployment, Newcomer("y").request(waiting))
    assert (deployment.registry.status("gone"), deployment.registry.show("gone").reason) == (
        "revoked",
        "stolen",
    )
    row = deployment.registry.show("waits")
    assert is_pending(row)
    assert is_claimed_twice(row)


def test_spent_token_of_many_uses_is_only_refused(deployment: Deployment) -> None:
    token = deployment.mint(uses=2)
    for name in ("a", "b"):
        deployment.enrolment.enrol(Newcomer(name).request(token))
    assert refused(deployment, Newcomer("c").request(token)) == "token_used"
    assert "token.claimed_twice" not in kinds(deployment)


def test_every_device_of_a_token_of_many_uses_is_answered_again(deployment: Deployment) -> None:
    token, newcomers = deployment.mint(uses=3), [Newcomer(name) for name in ("a", "b", "c")]
    for newcomer in newcomers:
        deployment.enrolment.enrol(newcomer.request(token))
    for newcomer in newcomers:
        assert deployment.enrolment.enrol(newcomer.request(token)).device == newcomer.device
    assert len(deployment.registry.devices()) == 3


def test_pending_device_is_approved_or_stays_out(deployment: Deployment) -> None:
    token = deployment.mint(uses=2)
    for name in ("a", "b"):
        deployment.enrolment.enrol(Newcomer(name).request(token))
    assert [row.device for row in deployment.registry.devices() if is_pending(row)] == ["a", "b"]
    deployment.registry.approve("a")
    deployment.registry.quarantine("a", "three strikes")
    assert [row.device for row in deployment.registry.devices() if is_pending(row)] == ["b"]


def test_names_of_a_token_begin_as_it_says(deployment: Deployment) -> None:
    token = deployment.mint("cam-*", uses=3)
    assert token.device == ""
    assert deployment.enrolment.enrol(Newcomer("cam-x").request(token)).device == "cam-x"
    assert refused(deployment, Newcomer("door-1").request(token)) == "name"
    assert refused(deployment, Newcomer("aggregator").request(deployment.mint())) == "name_taken"
    with pytest.raises(EnrolmentError, match="begin with cam-"):
        deployment.enrolment.enrol(Newcomer("door-1").request(token))


@pytest.mark.parametrize("name", ["a/b*", "*", "**", "a*b", "aggregator", "taken"])
def test_name_that_no_device_can_have_is_never_promised(deployment: Deployment, name: str) -> None:
    deployment.enrolment.enrol(Newcomer("taken").request(deployment.mint()))
    with pytest.raises(ConfigurationError):
        deployment.mint(name)


def numbered(deployment: Deployment, pattern: str, count: int) -> list[str]:
    with deployment.database.read() as connection:
        return free_names(connection, pattern, count, now=deployment.clock.now())


def test_numbered_names_go_on_where_devices_and_open_tokens_leave_off(deployment: Deployment) -> None:
    assert numbered(deployment, "cam-{n:03}", 2) == ["cam-001", "cam-002"]
    deployment.enrolment.enrol(Newcomer("cam-001").request(deployment.mint()))
    deployment.mint("cam-003", life_seconds=60.0)
    assert numbered(deployment, "cam-{n:03}", 2) == ["cam-002", "cam-004"]
    deployment.clock.seconds += 3600.0
    assert numbered(deployment, "cam-{n:03}", 2) == ["cam-002", "cam-003"]
    assert numbered(deployment, "{n}-door", 1) == ["1-door"]


@pytest.mark.parametrize("pattern", ["cam", "cam-{x}", "cam-{n}{n}", "cam-{n:3}", "a/{n}", "x" * 64 + "{n}"])
def test_pattern_that_gives_no_names_is_refused(deployment: Deployment, pattern: str) -> None:
    with pytest.raises(ConfigurationError):
        numbered(deployment, pattern, 1)


def test_whole_reason_of_a_refusal_is_in_the_operators_log(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    token = deployment.mint()
    with caplog.at_level("INFO"), pytest.raises(EnrolmentError):
        deployment.enrolment.enrol(Newcomer("guess").request(token, secret="A" * 43), "192.0.2.7")
    (line,) = [record for record in caplog.records if record.getMessage() == "enrolment_refused"]
    fields = line.__dict__["fields"]
    assert (fields["reason"], fields["device"], fields["address"]) == ("token", "guess", "192.0.2.7")
    assert fields["id"] == token.token_id
    assert token.secret not in str(line.__dict__)
