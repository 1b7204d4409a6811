"""The release check of a real device: in a child, over mutual TLS, with its certificate renewed on the way."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.enrol import enrol
from edge_agent.release.child import ChildReleases
from models.bundle import Bundle
from process.clock import SystemClock
from tests.edge.aggregator import Aggregator
from tests.edge.tiny_release import SteppedClock
from wire.errors import ReleaseError, TransportError
from wire.manifest import GRAPH_FILES
from wire.primitives import certificate_not_after, sha256


@pytest.fixture
def state(aggregator: Aggregator, tmp_path: Path) -> Path:
    enrol(aggregator.token(), tmp_path / "state", clock=SystemClock())
    return tmp_path / "state"


def releases(state: Path, *, graphs: str = "", now: float | None = None) -> tuple[ChildReleases, list[bytes]]:
    """A source, and the certificate as it is on disk after each check."""
    seen: list[bytes] = []
    place = state / "identity" / identity_files.CERTIFICATE
    clock = SteppedClock(now) if now is not None else SystemClock()
    source = ChildReleases(
        state, clock, graphs=lambda: graphs, checked=lambda: seen.append(place.read_bytes())
    )
    return source, seen


def enrolled_days_ago(aggregator: Aggregator, state: Path, days: float) -> Path:
    """A device whose certificate has that age."""
    aggregator.age_days = days
    try:
        enrol(aggregator.token(), state, clock=SystemClock())
    finally:
        aggregator.age_days = 0.0
    return state


def nothing(_: str) -> frozenset[str]:
    return frozenset()


def test_new_release_is_found_and_downloaded(aggregator: Aggregator, state: Path) -> None:
    source, seen = releases(state)
    offer = source.fetch(0, nothing, {})
    assert (offer.release_version, offer.rollback) == (1, False)
    assert seen == [identity_files.load(state).certificate_pem]
    assert offer.keys.tenant == "acme"
    assert {path.is_file() for path in offer.files.values() if isinstance(path, Path)} == {True}
    assert set(GRAPH_FILES) < set(offer.files)
    assert offer.fetched_bytes > 10_000
    source.clear()
    assert not any(path.exists() for path in offer.files.values() if isinstance(path, Path))


def test_what_is_held_is_not_downloaded_again(bundle: Bundle, state: Path) -> None:
    source, _ = releases(state, graphs=bundle.manifest.graphs_sha256)
    offer = source.fetch(0, lambda graphs: frozenset(GRAPH_FILES), {})
    assert not set(GRAPH_FILES) & set(offer.files)
    assert "checkpoint.bin" in offer.files


def test_checkpoint_that_came_as_a_head_is_not_downloaded(bundle: Bundle, state: Path) -> None:
    head = bundle.checkpoint().to_bytes()
    source, _ = releases(state, graphs=bundle.manifest.graphs_sha256)
    source.fetch(0, lambda graphs: frozenset(GRAPH_FILES), {})  # and the metadata
    source.clear()
    whole = source.fetch(0, lambda graphs: frozenset(GRAPH_FILES), {})
    source.clear()
    rest = source.fetch(0, lambda graphs: frozenset(GRAPH_FILES), {sha256(head).hex(): head})
    assert rest.files.keys() == whole.files.keys()
    assert whole.fetched_bytes - rest.fetched_bytes == len(head)
    place = rest.files["checkpoint.bin"]
    assert isinstance(place, Path)
    assert place.read_bytes() == head


def test_damaged_head_of_a_release_is_downloaded_anew(bundle: Bundle, state: Path) -> None:
    head = bundle.checkpoint().to_bytes()
    spoiled = head[:-1] + bytes([head[-1] ^ 1])
    source, _ = releases(state, graphs=bundle.manifest.graphs_sha256)
    offer = source.fetch(0, lambda graphs: frozenset(GRAPH_FILES), {sha256(head).hex(): spoiled})
    place = offer.files["checkpoint.bin"]
    assert isinstance(place, Path)
    assert place.read_bytes() == head


def test_heads_of_a_release_that_serves_do_not_stay_on_the_disk(state: Path) -> None:
    source, _ = releases(state)
    assert source.fetch(1, nothing, {"ab" * 32: b"head"}).files == {}
    assert not (state / "tuf" / "targets").exists()


def test_release_that_serves_is_not_downloaded(state: Path) -> None:
    assert releases(state)[0].fetch(1, nothing, {}).files == {}


@pytest.mark.parametrize(("age_days", "is_renewed"), [(3.0, False), (5.0, True)])
def test_certificate_is_renewed_when_two_thirds_of_its_life_are_over(
    aggregator: Aggregator, tmp_path: Path, age_days: float, is_renewed: bool
) -> None:
    state = enrolled_days_ago(aggregator, tmp_path / "state", age_days)
    source, seen = releases(state)
    source.fetch(1, nothing, {})
    after = identity_files.load(state).certificate_pem
    assert seen == [after]
    assert (certificate_not_after(after) > time.time() + 6.9 * 86_400) == is_renewed


def test_certificate_is_renewed_though_the_check_fails(state: Path) -> None:
    before = identity_files.load(state).certificate_pem
    source, seen = releases(state, now=time.time() + 5 * 86_400)
    with pytest.raises(ReleaseError, match="does not verify"):
        source.fetch(1, nothing, {})
    assert seen == [identity_files.load(state).certificate_pem]
    assert seen != [before]


def test_renewal_that_fails_is_said_and_the_check_goes_on(
    aggregator: Aggregator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = enrolled_days_ago(aggregator, tmp_path / "state", 5.0)
    source, seen = releases(state)
    before = identity_files.load(state).certificate_pem
    aggregator.refuses_renewals = True
    try:
        assert source.fetch(0, nothing, {}).release_version == 1
    finally:
        aggregator.refuses_renewals = False
    assert seen == [before]
    assert "certificate_not_renewed" in caplog.text


def test_metadata_that_has_expired_by_our_clock_is_a_release_error(state: Path) -> None:
    source, _ = releases(state, now=time.time() + 20 * 365 * 86_400)
    with pytest.raises(ReleaseError, match="does not verify"):
        source.fetch(0, nothing, {})


def test_aggregator_that_is_away_is_a_transport_error(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = state / "identity" / "enrolment.json"
    port = identity_files.load(state).url_api.rsplit(":", 1)[1]
    place.write_text(place.read_text().replace(f":{port}", ":1"))
    monkeypatch.setattr("edge_agent.release.child.TIMEOUT_SECONDS", 60.0)
    with pytest.raises(TransportError):
        releases(state)[0].fetch(0, nothing, {})


def test_child_that_dies_is_a_release_error(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.child.sys.executable", "/bin/false")
    with pytest.raises(ReleaseError, match="without a result"):
        releases(state)[0].fetch(0, nothing, {})
