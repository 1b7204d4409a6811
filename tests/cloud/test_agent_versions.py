"""The oldest agent that is asked: compared by numbers, and a device may say anything."""

from __future__ import annotations

import pytest

from cloud_server.registry import Registry, add_device
from tests.cloud.deployment import Deployment
from wire.agent_versions import check_least, is_new_enough
from wire.errors import ConfigurationError
from wire.messages import Birth
from wire.primitives import SigningKey


@pytest.mark.parametrize(
    ("version", "least", "expected"),
    [
        ("0.1.0", "", True),
        ("", "", True),
        ("0.2.0", "0.2.0", True),
        ("0.2", "0.2.0", True),
        ("0.10.0", "0.9", True),
        ("0.9.9", "0.10", False),
        ("1.0.0rc1", "1.0.0", True),
        ("1.0.0", "1.0.0.1", False),
        ("", "0.1", False),
        ("newest", "0.1", False),
        ("-1", "0", False),
        ("9" * 60, "1", True),
        ("٣.0", "1", False),
    ],
)
def test_version_is_compared_by_its_numbers(version: str, least: str, expected: bool) -> None:
    assert is_new_enough(version, least) is expected


@pytest.mark.parametrize("least", ["new", "1.x", "1.0rc1", ".1", "1.2.3.4.5"])
def test_setting_that_is_no_version_is_refused(least: str) -> None:
    with pytest.raises(ConfigurationError, match="min_agent_version"):
        check_least(least)


def test_old_agent_is_not_asked_until_it_is_updated(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(deployment.database, deployment.clock, min_agent_version="0.2")
    with deployment.database.transaction() as connection:
        for name in ("old", "new"):
            add_device(connection, name, SigningKey.generate().verify_key, now=1.0)

    def begin(name: str, version: str) -> None:
        birth = Birth(status="online", boot_id=bytes(16), agent_version=version, wire_versions=(1, 1))
        registry.note_birth(name, birth)

    begin("new", "0.2.1")
    begin("old", "0.1.9")
    assert list(registry.present()) == ["new"]
    assert "agent_too_old" in caplog.text
    begin("old", "0.2.0")
    assert list(registry.present()) == ["new", "old"]
