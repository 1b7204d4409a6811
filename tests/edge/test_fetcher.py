"""Downloads over a real TLS connection that breaks, and the in-memory fetcher that simulations use."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from cloud_server.enrolment.ca import CertificateAuthority
from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.https import retry_after_seconds
from edge_agent.enrolment.identity import Identity
from edge_agent.release.fetcher import Fetcher, HttpsFetcher, MemoryFetcher
from tests.edge.https_server import TLS_NAME, Script, https_server
from wire.enrolment import OnlineKey
from wire.errors import PeerError, RefusedError, TransportError, TrustError
from wire.primitives import SigningKey, generate_tls_key, make_csr

NOW = time.time()
DATA = random.Random(1).randbytes(1_000_000)


def make_identity(folder: Path, authority: CertificateAuthority, url: str) -> Identity:
    """An enrolled device, its files in `folder`."""
    key = generate_tls_key()
    issued = authority.issue_device(make_csr(key, "device-1").decode(), "device-1", now=NOW)
    identity = Identity(
        tenant="tenant",
        fleet="fleet",
        device="device-1",
        url_enrol=url,
        url_api=url,
        tls_name=TLS_NAME,
        mqtt_host="127.0.0.1",
        mqtt_port=1883,
        mqtt_tls=False,
        ca_pem=authority.certificate_pem.encode(),
        certificate_pem=issued.pem.encode(),
        update_key=SigningKey.generate(),
        tuf_root=b"{}",
        kem=(OnlineKey(id="00" * 8, algorithm="x25519", public="ab" * 32),),
        orders=(OnlineKey(id="11" * 8, public="cd" * 32),),
    )
    identity_files.save(identity, folder, tls_key_pem=key)
    return identity_files.load(folder)


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", name="test CA", now=NOW)


@pytest.fixture
def script() -> Script:
    return Script(files={"/targets/file": DATA, "/small": b"small", "/empty": b""})


@pytest.fixture
def url(tmp_path: Path, authority: CertificateAuthority, script: Script) -> Iterator[str]:
    with https_server(tmp_path / "server", authority, script, now=NOW, wants_client=True) as url:
        yield url


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def fetcher(
    tmp_path: Path, authority: CertificateAuthority, url: str, pauses: list[float]
) -> Iterator[HttpsFetcher]:
    identity = make_identity(tmp_path / "device", authority, url)
    fetcher = HttpsFetcher(identity, timeout_seconds=5.0, attempts=3, pause=pauses.append)
    yield fetcher
    fetcher.close()


def fetch(fetcher: Fetcher, path: str, *, offset: int = 0, limit_bytes: int = 2_000_000) -> bytes:
    return b"".join(fetcher.fetch(path, offset=offset, limit_bytes=limit_bytes))


def test_whole_file_is_fetched_over_mutual_tls(fetcher: HttpsFetcher) -> None:
    assert fetch(fetcher, "/targets/file") == DATA
    assert fetch(fetcher, "/empty") == b""
    assert fetcher.fetched_bytes_total == len(DATA)


def test_requests_share_one_connection_even_after_a_refusal(fetcher: HttpsFetcher, script: Script) -> None:
    fetch(fetcher, "/small")
    with pytest.raises(RefusedError) as caught:
        fetch(fetcher, "/nothing")
    assert caught.value.facts["status"] == 404
    fetch(fetcher, "/targets/file")
    assert script.connections == 1


def test_offset_asks_for_the_rest_only(fetcher: HttpsFetcher, script: Script) -> None:
    assert fetch(fetcher, "/targets/file", offset=900_000, limit_bytes=100_000) == DATA[900_000:]
    assert script.requests[-1] == ("GET", "/targets/file", "bytes=900000-")


def test_server_without_ranges_still_gives_the_rest(fetcher: HttpsFetcher, script: Script) -> None:
    script.ignores_ranges = True
    assert fetch(fetcher, "/targets/file", offset=900_000, limit_bytes=100_000) == DATA[900_000:]


def test_answer_of_another_range_is_refused(fetcher: HttpsFetcher, script: Script) -> None:
    script.wrong_range = True
    with pytest.raises(PeerError, match="another range"):
        fetch(fetcher, "/targets/file", offset=10)


def test_cut_connections_are_resumed_where_they_stopped(
    fetcher: HttpsFetcher, script: Script, pauses: list[float]
) -> None:
    script.cut_after = [300_000, 100_000, 1, 5_000, 200_000]
    assert fetch(fetcher, "/targets/file") == DATA
    ranges = [wanted for _, _, wanted in script.requests]
    assert ranges[0] == ""
    offsets = [int(wanted.removeprefix("bytes=").rstrip("-")) for wanted in ranges[1:]]
    assert offsets == sorted(offsets)
    assert offsets[-1] == 300_000 + 100_000 + 1 + 5_000 + 200_000
    assert len(pauses) == 5
    assert max(pauses) <= 0.5, "every attempt made progress, so the back-off begins anew"


def test_connection_that_never_makes_progress_is_given_up(
    fetcher: HttpsFetcher, script: Script, pauses: list[float]
) -> None:
    script.cut_after = [0] * 10
    with pytest.raises(TransportError):
        fetch(fetcher, "/targets/file")
    assert len(script.requests) == 3
    assert len(pauses) == 2
    assert pauses[0] <= 0.5
    assert pauses[1] <= 1.0


def test_busy_server_is_asked_again(fetcher: HttpsFetcher, script: Script, pauses: list[float]) -> None:
    script.statuses = [503, 429]
    assert fetch(fetcher, "/small") == b"small"
    assert len(pauses) == 2
    assert pauses[0] <= 0.5
    assert pauses[1] <= 1.0


@pytest.mark.parametrize("date", [False, True])
def test_what_a_busy_server_asks_for_is_obeyed(
    fetcher: HttpsFetcher, script: Script, pauses: list[float], date: bool
) -> None:
    script.statuses, script.retry_after = [503], formatdate(time.time() + 20.5) if date else "20"
    assert fetch(fetcher, "/small") == b"small"
    assert 18.0 < pauses[0] <= 42.0


def test_server_that_asks_for_hours_is_left_to_the_next_check(
    fetcher: HttpsFetcher, script: Script, pauses: list[float]
) -> None:
    script.statuses, script.retry_after = [503], "7200"
    with pytest.raises(TransportError) as caught:
        fetch(fetcher, "/small")
    assert caught.value.facts["asked_seconds"] == 7200.0
    assert pauses == []


@pytest.mark.parametrize(
    "text", ["", "soon", "-5", "Wed, 21 Oct 2015 07:28:00 GMT", "1e9", "9" * 400, "\u0663"]
)
def test_retry_after_that_says_nothing_useful_is_no_wait(text: str) -> None:
    assert 0.0 <= retry_after_seconds(text, NOW) <= 1e12
    assert retry_after_seconds(text, NOW) == (0.0 if not text.startswith("9") else 999_999_999_999.0)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 500])
def test_refusal_is_not_tried_again(fetcher: HttpsFetcher, script: Script, status: int) -> None:
    script.statuses = [status]
    with pytest.raises(RefusedError) as caught:
        fetch(fetcher, "/small")
    assert caught.value.facts["status"] == status
    assert len(script.requests) == 1


def test_file_beyond_the_limit_is_refused_without_reading_it_all(fetcher: HttpsFetcher) -> None:
    with pytest.raises(PeerError) as caught:
        fetch(fetcher, "/targets/file", limit_bytes=1000)
    assert caught.value.facts["limit_bytes"] == 1000
    assert fetcher.fetched_bytes_total <= 1000


def test_kept_connection_that_the_server_closed_is_replaced(
    fetcher: HttpsFetcher, script: Script, pauses: list[float]
) -> None:
    fetch(fetcher, "/small")
    for connection in fetcher._idle:
        assert connection.sock is not None
        connection.sock.shutdown(2)
    assert fetch(fetcher, "/small") == b"small"
    assert script.connections == 2
    assert pauses == []


def test_two_downloads_at_once(fetcher: HttpsFetcher) -> None:
    one = fetcher.fetch("/targets/file", limit_bytes=2_000_000)
    first = next(one)
    assert fetch(fetcher, "/small") == b"small"
    assert first + b"".join(one) == DATA


class FastClock:
    """Every look at it is a minute later."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        self.seconds += 60.0
        return self.seconds


def test_server_that_drips_is_given_up(tmp_path: Path, authority: CertificateAuthority, url: str) -> None:
    identity = make_identity(tmp_path / "slow", authority, url)
    fetcher = HttpsFetcher(identity, timeout_seconds=5.0, clock=FastClock())
    with pytest.raises(PeerError, match="drips"):
        fetch(fetcher, "/small")


def test_server_of_another_ca_is_not_talked_to(tmp_path: Path, url: str, script: Script) -> None:
    other = CertificateAuthority.create(tmp_path / "other", name="other CA", now=NOW)
    fetcher = HttpsFetcher(make_identity(tmp_path / "device", other, url))
    with pytest.raises(TrustError):
        fetch(fetcher, "/small")
    assert script.requests == []


def test_server_with_another_name_is_not_talked_to(
    tmp_path: Path, authority: CertificateAuthority, url: str, script: Script
) -> None:
    identity = replace(make_identity(tmp_path / "device", authority, url), tls_name="somebody.else")
    with pytest.raises(TrustError):
        fetch(HttpsFetcher(identity), "/small")
    assert script.requests == []


def test_device_without_a_certificate_of_the_fleet_is_refused(
    tmp_path: Path, authority: CertificateAuthority, url: str, script: Script
) -> None:
    other = CertificateAuthority.create(tmp_path / "other", name="other CA", now=NOW)
    identity = make_identity(tmp_path / "device", other, url)
    identity = replace(identity, ca_pem=authority.certificate_pem.encode())
    with pytest.raises(TransportError):
        fetch(HttpsFetcher(identity, pause=lambda _: None), "/small")
    assert script.requests == []


def test_nobody_there_is_a_transport_error(tmp_path: Path, authority: CertificateAuthority) -> None:
    identity = make_identity(tmp_path / "device", authority, "https://127.0.0.1:9")
    with pytest.raises(TransportError, match="cannot connect"):
        fetch(HttpsFetcher(identity, attempts=2, pause=lambda _: None), "/small")


def test_memory_fetcher_behaves_like_the_network() -> None:
    fetcher = MemoryFetcher({"/file": DATA})
    assert fetch(fetcher, "/file") == DATA
    assert fetch(fetcher, "/file", offset=999_990) == DATA[-10:]
    assert fetch(MemoryFetcher({"/file": DATA}.get), "/file", limit_bytes=len(DATA)) == DATA
    with pytest.raises(RefusedError) as caught:
        fetch(fetcher, "/nothing")
    assert caught.value.facts["status"] == 404
    with pytest.raises(PeerError):
        fetch(fetcher, "/file", limit_bytes=10)
    assert fetcher.fetched_bytes_total == len(DATA) + 10
