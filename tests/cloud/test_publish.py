"""Publication: what is kept, signed and announced, and that asking twice changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_server.db import releases as table
from cloud_server.db.audit import load_audit, verify_audit
from cloud_server.db.releases import CANDIDATE, HELD, RELEASED, ROLLED_BACK
from cloud_server.release.publish import Publisher
from tests.cloud.deployment import Deployment
from tests.cloud.small_bundle import make_candidate, make_manifest, write_bundle
from wire.errors import ConfigurationError, ReleaseError, StorageError
from wire.manifest import Release


@pytest.fixture
def publisher(deployment: Deployment, tmp_path: Path) -> Publisher:
    """A publisher whose model is imported and whose first release is out."""
    made = Publisher(deployment.database, deployment.artefacts, deployment.repository, deployment.clock)
    bundle = write_bundle(tmp_path / "bundle")
    made.import_model(bundle)
    made.publish(made.propose_bundle(bundle).version)
    return made


def propose(publisher: Publisher, round_number: int) -> int:
    row = publisher.propose(
        make_candidate(round_number), run="r", round_number=round_number, metrics={"accuracy": 0.6}
    )
    return row.version


def state(deployment: Deployment, version: int) -> str:
    with deployment.database.read() as connection:
        row = table.load_release(connection, version)
    assert row is not None
    return row.state


def test_first_release_is_the_bundles_own(publisher: Publisher, deployment: Deployment) -> None:
    assert deployment.repository.ring("stable") == (1, 1)
    assert state(deployment, 1) == RELEASED
    with deployment.database.read() as connection:
        models = table.load_models(connection)
    assert [model.name for model in models] == ["small"]
    assert models[0].manifest == make_manifest().to_bytes()


def test_import_of_the_same_bundle_changes_nothing(
    publisher: Publisher, deployment: Deployment, tmp_path: Path
) -> None:
    before = deployment.repository.timestamp()
    bundle = write_bundle(tmp_path / "again")
    publisher.import_model(bundle)
    assert publisher.propose_bundle(bundle).version == 1
    publisher.publish(1)
    assert deployment.repository.timestamp() == before
    with deployment.database.read() as connection:
        assert len(table.load_rollouts(connection)) == 1


def test_candidate_of_a_round_is_signed_when_it_is_published(
    publisher: Publisher, deployment: Deployment
) -> None:
    version = propose(publisher, 3)
    assert version == 2
    assert state(deployment, 2) == CANDIDATE
    assert deployment.repository.releases() == [1]
    announcement = publisher.publish(2)
    assert announcement.channel == "stable"
    assert announcement.release_version == 2
    assert announcement.timestamp == deployment.repository.timestamp()
    assert deployment.repository.releases() == [1, 2]
    assert state(deployment, 2) == RELEASED


def test_release_record_is_what_the_candidate_says(publisher: Publisher, deployment: Deployment) -> None:
    version = propose(publisher, 3)
    data = deployment.artefacts.read(f"releases/{version}/release.json")
    assert data is not None
    expected = make_candidate(3).release(version, {"accuracy": 0.6}, deployment.clock.now())
    assert Release.from_bytes(data) == expected


def test_candidate_asked_for_twice_is_the_same(publisher: Publisher) -> None:
    assert propose(publisher, 3) == propose(publisher, 3) == 2
    assert propose(publisher, 4) == 3


def test_candidate_that_was_held_back_is_never_signed(publisher: Publisher, deployment: Deployment) -> None:
    version = propose(publisher, 3)
    publisher.hold(version, "accuracy fell")
    publisher.hold(version, "accuracy fell")
    assert state(deployment, version) == HELD
    assert deployment.repository.releases() == [1]
    assert publisher.announcement().release_version == 1
    with deployment.database.read() as connection:
        held = [entry for entry in load_audit(connection) if entry.kind == "release.held"]
        assert verify_audit(connection) >= 3
    assert len(held) == 1


def test_held_candidate_goes_out_by_the_operators_word(publisher: Publisher, deployment: Deployment) -> None:
    version = propose(publisher, 3)
    publisher.hold(version, "accuracy fell")
    assert publisher.publish(version).release_version == version
    assert state(deployment, version) == RELEASED


def test_release_that_is_out_cannot_be_held(publisher: Publisher) -> None:
    with pytest.raises(ReleaseError, match="no candidate"):
        publisher.hold(1, "too late")


def test_publication_that_died_before_its_books_is_finished(
    publisher: Publisher, deployment: Deployment
) -> None:
    version = propose(publisher, 3)
    data = deployment.artefacts.read(f"releases/{version}/release.json")
    assert data is not None
    names = ("checkpoint.bin", "golden_inputs.bin", "golden_outputs.bin")
    files = {name: deployment.artefacts.read(f"releases/{version}/{name}") or b"" for name in names}
    deployment.repository.add_release(Release.from_bytes(data), files)
    deployment.repository.set_ring("stable", version)
    assert publisher.publish(version).release_version == version
    assert state(deployment, version) == RELEASED
    with deployment.database.read() as connection:
        rows = table.load_rollouts(connection, "stable")
    assert [(row.serial, row.release_version, row.previous_version) for row in rows] == [(1, 1, 0), (2, 2, 1)]


def test_rollback_goes_to_what_ran_before(publisher: Publisher, deployment: Deployment) -> None:
    for round_number in (1, 2):
        publisher.publish(propose(publisher, round_number))
    announcement = publisher.rollback(reason="errors rose")
    assert announcement.release_version == 2
    assert state(deployment, 3) == ROLLED_BACK
    with deployment.database.read() as connection:
        last = table.load_rollouts(connection, "stable")[-1]
    assert (last.release_version, last.previous_version, last.rollback, last.reason) == (
        2,
        3,
        True,
        "errors rose",
    )
    publisher.publish(propose(publisher, 3))
    assert publisher.rollback().release_version == 2


def test_rollback_to_a_release_that_left_the_metadata_signs_it_again(
    publisher: Publisher, deployment: Deployment
) -> None:
    for round_number in range(1, 20):
        publisher.publish(propose(publisher, round_number))
    assert 2 not in deployment.repository.releases()
    assert publisher.rollback(version=2).release_version == 2
    assert 2 in deployment.repository.releases()


@pytest.mark.parametrize("version", [0, 1, 2, 9])
def test_rollback_to_nothing_older_is_refused(publisher: Publisher, version: int) -> None:
    with pytest.raises(ConfigurationError, match="cannot go back"):
        publisher.rollback(version=version)


def test_rollback_of_a_ring_that_was_never_set_is_refused(publisher: Publisher) -> None:
    with pytest.raises(ConfigurationError, match="canary"):
        publisher.rollback("canary")


def test_publication_of_an_unknown_version_is_refused(publisher: Publisher) -> None:
    with pytest.raises(ReleaseError, match="no release 9"):
        publisher.publish(9)


def test_publication_of_an_older_version_is_refused(publisher: Publisher) -> None:
    publisher.publish(propose(publisher, 1))
    with pytest.raises(ReleaseError, match="newer than 1"):
        publisher.publish(1)


def test_candidate_for_graphs_of_another_model_is_refused(
    publisher: Publisher, deployment: Deployment
) -> None:
    stranger = make_candidate(1, make_manifest("stranger"))
    with pytest.raises(StorageError):
        publisher.propose(stranger, run="r", round_number=1, metrics={})
    assert propose(publisher, 2) == 2
