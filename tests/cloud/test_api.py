"""The HTTPS ports, over real sockets and TLS, spoken to by the agent's own client."""

from __future__ import annotations

import gc
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from cloud_server.deployment import Deployment, initialise
from cloud_server.enrolment.tokens import mint_token
from cloud_server.https import HttpsFront
from cloud_server.settings import CloudSettings, EnrolmentSettings, ListenSettings
from edge_agent.enrolment.enrol import enrol, renew, renew_late
from edge_agent.enrolment.https import HttpsConnection, identity_context, unverified_context, verified_context
from edge_agent.enrolment.identity import Identity
from edge_agent.release.fetcher import HttpsFetcher
from process.clock import SystemClock
from tests.cloud.deployment import Newcomer
from wire.enrolment import EnrolmentToken, encode_json
from wire.errors import ConfigurationError, EnrolmentError, RefusedError, TransportError, TrustError
from wire.primitives import certificate_not_after

BROKER = "mqtt://127.0.0.1:1883"
CLOCK = SystemClock()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    settings = CloudSettings(
        tenant="t",
        fleet="f",
        listen=ListenSettings(public_port=0, device_port=0, tls_name="cloud.test"),
        enrolment=EnrolmentSettings(address_per_minute=10_000, per_minute=10_000),
    )
    with initialise(tmp_path_factory.mktemp("cloud") / "state", settings) as made:
        yield made


@pytest.fixture(scope="module")
def front(deployment: Deployment) -> Iterator[HttpsFront]:
    with HttpsFront(deployment, broker_url=BROKER) as served:
        yield served


def mint(deployment: Deployment, front: HttpsFront, device: str = "") -> EnrolmentToken:
    with deployment.database.transaction() as connection:
        return mint_token(connection, deployment.door(front.public_port), now=CLOCK.now(), device=device)


@pytest.fixture
def identity(deployment: Deployment, front: HttpsFront, tmp_path: Path) -> Identity:
    """A device of its own for each test."""
    name = f"device-{len(deployment.registry.devices())}"
    return enrol(str(mint(deployment, front, name)), tmp_path / "device", clock=CLOCK)


@dataclass(frozen=True)
class Answer:
    """One answer, whole."""

    status: int
    headers: Mapping[str, str]
    data: bytes


def ask(connection: HttpsConnection, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    connection.request(method, path, body or None, headers)
    response = connection.getresponse()
    return Answer(response.status, dict(response.getheaders()), response.read())


def call(identity: Identity, method: str, path: str, **headers: str) -> Answer:
    connection = as_device(identity)
    try:
        return ask(connection, method, path, **headers)
    finally:
        connection.close()


def fetch(identity: Identity, path: str, *, offset: int = 0) -> bytes:
    """What the agent's own fetcher gets."""
    fetcher = HttpsFetcher(identity, clock=CLOCK)
    try:
        return b"".join(fetcher.fetch(path, offset=offset, limit_bytes=100_000))
    finally:
        fetcher.close()


def as_device(identity: Identity) -> HttpsConnection:
    return HttpsConnection(identity.url_api, tls_name=identity.tls_name, context=identity_context(identity))


def public(front: HttpsFront, deployment: Deployment, method: str, path: str, body: bytes = b"") -> Answer:
    context = verified_context(deployment.authority.certificate_pem.encode())
    url = f"https://127.0.0.1:{front.public_port}"
    connection = HttpsConnection(url, tls_name="cloud.test", context=context)
    try:
        return ask(connection, method, path, body)
    finally:
        connection.close()


def test_device_enrols_and_knows_its_way(identity: Identity, deployment: Deployment) -> None:
    assert (identity.tenant, identity.fleet) == ("t", "f")
    assert (identity.mqtt_host, identity.mqtt_port, identity.mqtt_tls) == ("127.0.0.1", 1883, False)
    assert deployment.registry.status(identity.device) == "approved"
    assert identity.tuf_root == deployment.repository.first_root()


def test_device_fetches_metadata_and_targets(identity: Identity, deployment: Deployment) -> None:
    assert fetch(identity, "/metadata/timestamp.json") == deployment.repository.timestamp()
    data = deployment.keys.online_json(tenant="t", fleet="f")
    keys = deployment.artefacts.keys("tuf/targets/keys")
    path = "/" + next(key for key in keys if key.endswith("online.json")).removeprefix("tuf/")
    assert fetch(identity, path) == data
    assert fetch(identity, path, offset=10) == data[10:]


@pytest.mark.parametrize(
    ("header", "status", "expected"),
    [
        ("", 200, (0, 3_000_000)),
        ("bytes=0-9", 206, (0, 10)),
        ("bytes=2999990-", 206, (2_999_990, 3_000_000)),
        ("bytes=-7", 206, (2_999_993, 3_000_000)),
        ("bytes=5-99999999", 206, (5, 3_000_000)),
        ("bytes=1000000-2500000", 206, (1_000_000, 2_500_001)),
        ("bytes=3000000-", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=9-5", 200, (0, 3_000_000)),
        ("bytes=0-1,5-6", 200, (0, 3_000_000)),
        ("lines=1-2", 200, (0, 3_000_000)),
        ("bytes=" + "9" * 40 + "-", 200, (0, 3_000_000)),
    ],
)
def test_target_is_served_by_range(
    identity: Identity, deployment: Deployment, header: str, status: int, expected: tuple[int, int] | None
) -> None:
    whole = bytes(range(250)) * 12_000
    deployment.artefacts.write("tuf/targets/graphs/aa/x.big.bin", whole)
    headers = {"Range": header} if header else {}
    answer = call(identity, "GET", "/targets/graphs/aa/x.big.bin", **headers)
    assert answer.status == status
    if expected is None:
        assert answer.headers["content-range"] == "bytes */3000000"
        assert answer.data == b""
        return
    start, end = expected
    assert answer.data == whole[start:end]
    assert answer.headers["content-length"] == str(end - start)
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/3000000"


@pytest.mark.parametrize(
    "path",
    [
        "/metadata/../../keys/online/order.key",
        "/metadata/%2e%2e/%2e%2e/keys/online/order.key",
        "/targets/..%2f..%2f..%2fcloud.db",
        "/metadata//etc/passwd",
        "/metadata/9.root.json",
        "/blobs/xyz",
        "/blobs/" + "0" * 64,
        "/docs",
        "/openapi.json",
        "/v1/enroll",
        "/",
    ],
)
def test_path_that_was_not_published_is_missing(identity: Identity, path: str) -> None:
    answer = call(identity, "GET", path)
    assert answer.status in (404, 405)
    assert len(answer.data) < 200


def test_raw_update_in_the_store_is_not_served(identity: Identity, deployment: Deployment) -> None:
    digest = deployment.artefacts.put_blob(b"an update of another device")
    assert call(identity, "GET", f"/blobs/{digest}").status == 404


def test_checkpoint_is_served(identity: Identity, deployment: Deployment) -> None:
    digest = deployment.artefacts.put_blob(b"a head")
    with deployment.database.transaction() as connection:
        model = {"g": "ab" * 32}
        for statement in (
            "INSERT OR IGNORE INTO models VALUES (:g, 'm', x'00', :g, 0)",
            "INSERT OR IGNORE INTO runs VALUES ('r', 0, :g, '{}', 0, 'active')",
        ):
            connection.exec_driver_sql(statement, model)
        connection.exec_driver_sql(
            "INSERT INTO checkpoints (run, round, sha256, artefact_key, created) VALUES ('r', 0, :d, :d, 0)",
            {"d": digest},
        )
    answer = call(identity, "GET", f"/blobs/{digest}", Range="bytes=2-")
    assert (answer.status, answer.data) == (206, b"head")


def test_certificate_is_renewed_over_mutual_tls(identity: Identity, deployment: Deployment) -> None:
    serial = deployment.registry.show(identity.device).certificate_serial
    # Certificates count whole seconds, and a device refuses one that does not live longer than its own.
    with (
        Deployment.open(deployment.folder.root, clock=_Later(2.0)) as later,
        HttpsFront(later, broker_url=BROKER) as door,
    ):
        renewed = renew(replace(identity, url_api=f"https://127.0.0.1:{door.device_port}"))
    assert deployment.registry.show(identity.device).certificate_serial != serial
    assert call(replace(renewed, url_api=identity.url_api), "GET", "/metadata/timestamp.json").status == 200


class _Later(SystemClock):
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def now(self) -> float:
        return super().now() + self._seconds


def test_revoked_device_is_refused_on_its_open_connection(identity: Identity, deployment: Deployment) -> None:
    connection = as_device(identity)
    before = ask(connection, "GET", "/metadata/timestamp.json")
    assert (before.status, before.data) == (200, deployment.repository.timestamp())
    deployment.registry.revoke(identity.device, "stolen")
    after = ask(connection, "GET", "/metadata/timestamp.json")
    connection.close()
    assert (after.status, json.loads(after.data)["error"]) == (403, "revoked")
    with pytest.raises(RefusedError):
        fetch(identity, "/metadata/timestamp.json")
    with pytest.raises(EnrolmentError):
        renew(identity)


def is_refused(connection: HttpsConnection) -> bool:
    """Whether TLS ends the connection; in TLS 1.3 a client hears of it with its first read only."""
    try:
        connection.request("GET", "/metadata/timestamp.json")
        connection.getresponse()
    except (ssl.SSLError, ConnectionError, TransportError):
        return True
    finally:
        connection.close()
    return False


def test_device_port_asks_for_a_certificate(front: HttpsFront, deployment: Deployment) -> None:
    ca = deployment.authority.certificate_pem.encode()
    url = f"https://127.0.0.1:{front.device_port}"
    assert is_refused(HttpsConnection(url, tls_name="cloud.test", context=verified_context(ca)))


def test_device_port_refuses_a_certificate_of_another_ca(
    front: HttpsFront, identity: Identity, tmp_path: Path
) -> None:
    settings = CloudSettings(listen=ListenSettings(public_port=0, device_port=0))
    with initialise(tmp_path / "other", settings) as other, HttpsFront(other, broker_url=BROKER) as door:
        stranger = enrol(str(mint(other, door, identity.device)), tmp_path / "stranger", clock=CLOCK)
    context = verified_context(
        identity.ca_pem, certificate=stranger.certificate_path, key=stranger.tls_key_path
    )
    assert is_refused(HttpsConnection(identity.url_api, tls_name=identity.tls_name, context=context))


def test_public_port_answers_health_and_what_leads_to_the_ca_only(
    front: HttpsFront, deployment: Deployment
) -> None:
    assert public(front, deployment, "GET", "/healthz").data == b'{"status":"ok"}'
    assert public(front, deployment, "GET", "/v1/ca").data == deployment.authority.certificate_pem.encode()
    assert (
        public(front, deployment, "GET", "/metadata/timestamp.json").data == deployment.repository.timestamp()
    )
    store = deployment.artefacts
    listed = [*store.keys("tuf/metadata"), *store.keys("tuf/targets")]
    served = {
        key for key in listed if public(front, deployment, "GET", key.removeprefix("tuf")).status == 200
    }
    kinds = {key.rpartition("/")[2].split(".", 1)[1] for key in served if "timestamp" not in key}
    assert kinds == {"root.json", "snapshot.json", "targets.json", "keys.json", "authorities.pem"}
    assert {
        key for key in listed if "parameters" in key or "rings" in key or "online" in key
    } & served == set()
    for path in ("/blobs/" + "0" * 64, "/v1/renew", "/docs", "/openapi.json", "/metadata/%2e%2e/keys"):
        assert public(front, deployment, "GET", path).status == 404


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"\xff", b'{"token_id":1}', b"[" * 60_000])
def test_enrolment_with_a_bad_body_is_a_bad_request(
    front: HttpsFront, deployment: Deployment, body: bytes
) -> None:
    answer = public(front, deployment, "POST", "/v1/enroll", body)
    assert answer.status == 400
    assert json.loads(answer.data)["error"] == "bad_request"


def test_enrolment_with_a_long_body_is_cut_off(front: HttpsFront, deployment: Deployment) -> None:
    assert public(front, deployment, "POST", "/v1/enroll", b"x" * 70_000).status == 413


def test_enrolment_with_a_used_token_names_the_reason(
    front: HttpsFront, deployment: Deployment, tmp_path: Path
) -> None:
    token = str(mint(deployment, front))
    enrol(token, tmp_path / "one", name="one", clock=CLOCK)
    with pytest.raises(EnrolmentError) as caught:
        enrol(token, tmp_path / "two", name="two", clock=CLOCK)
    assert caught.value.facts["code"] == "token_used"
    assert not (tmp_path / "two" / "identity").exists()


def test_stranger_learns_nothing_of_tokens_but_that_his_is_none(
    front: HttpsFront, deployment: Deployment
) -> None:
    """Unknown, wrong, spent and for another name: the very same answer to whoever does not know the secret."""
    spent, named = mint(deployment, front, "spent"), mint(deployment, front, "named")
    honest = Newcomer("spent")
    public(front, deployment, "POST", "/v1/enroll", encode_json(honest.request(spent)))
    guess = Newcomer("guess")
    requests = [
        guess.request(named, token_id="0" * 16, proof=guess.proof("0" * 16)),
        guess.request(named, secret="A" * 43),
        guess.request(spent, secret="A" * 43),
        guess.request(named, secret="%"),
    ]
    answers = [public(front, deployment, "POST", "/v1/enroll", encode_json(each)) for each in requests]
    assert {answer.status for answer in answers} == {403}
    assert len({answer.data for answer in answers}) == 1
    assert deployment.registry.status("spent") == "approved"


def test_device_that_was_away_for_too_long_for_its_certificate_comes_back(
    identity: Identity, deployment: Deployment
) -> None:
    with (
        Deployment.open(deployment.folder.root, clock=_Later(30 * 86_400.0)) as later,
        HttpsFront(later, broker_url=BROKER) as door,
    ):
        there = replace(identity, url_enrol=f"https://127.0.0.1:{door.public_port}")
        renewed = renew_late(there)
        later.registry.quarantine(identity.device)
        with pytest.raises(EnrolmentError) as quarantined:
            renew_late(there)
        later.registry.revoke(identity.device)
        with pytest.raises(EnrolmentError) as revoked:
            renew_late(there)
    assert certificate_not_after(renewed.certificate_pem) > CLOCK.now() + 36 * 86_400.0
    assert quarantined.value.facts["code"] == "quarantined"
    assert "device approve" in quarantined.value.hint
    assert revoked.value.facts["code"] == "revoked"
    assert "another name" in revoked.value.hint


@pytest.mark.parametrize("path", ["/v1/enroll", "/v1/challenge", "/v1/late-renewal"])
def test_stranger_that_asks_too_often_is_told_when_to_come_again(tmp_path: Path, path: str) -> None:
    settings = CloudSettings(
        listen=ListenSettings(public_port=0, device_port=0, tls_name="cloud.test"),
        enrolment=EnrolmentSettings(address_per_minute=3),
    )
    with initialise(tmp_path / "state", settings) as made, HttpsFront(made, broker_url=BROKER) as door:
        answers = [public(door, made, "POST", path, b"{}") for _ in range(4)]
        assert public(door, made, "GET", "/healthz").status == 200
    assert [answer.status == 429 for answer in answers] == [False, False, False, True]
    assert json.loads(answers[-1].data)["error"] == "busy"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20


def test_answers_do_not_wait_for_the_acknowledgement_of_their_first_part(
    front: HttpsFront, deployment: Deployment
) -> None:
    context = verified_context(deployment.authority.certificate_pem.encode())
    name = deployment.settings.listen.tls_name
    address = f"https://127.0.0.1:{front.public_port}"
    with closing(HttpsConnection(address, tls_name=name, context=context)) as connection:
        ask(connection, "GET", "/healthz")
        ours = connection.sock.getsockname()
        (theirs,) = (each for each in _open_sockets() if each.getpeername() == ours)
        assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def _open_sockets() -> Iterator[socket.socket]:
    """Those of this process that are connected: the server runs in it."""
    for found in gc.get_objects():
        # `isinstance` would ask the object, and some of torch's warn when they are asked for anything.
        if issubclass(type(found), socket.socket) and found.fileno() != -1:
            try:
                found.getpeername()
            except OSError:
                continue
            yield found


@pytest.mark.parametrize("path", ["/v1/late-renewal", "/v1/challenge"])
def test_late_renewal_with_nonsense_is_a_bad_request_or_nothing(
    front: HttpsFront, deployment: Deployment, path: str
) -> None:
    for body in (b"", b"[1]", b"\xff", b"x" * 60_000):
        answer = public(front, deployment, "POST", path, body)
        assert answer.status == (400 if path == "/v1/late-renewal" else 200)
        assert public(front, deployment, "GET", path).status == 405


def test_stranger_that_asks_for_nothing_or_never_ends_is_let_go(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections are few: one that only holds its place, or drips its headers or its body, loses it."""
    monkeypatch.setattr("cloud_server.https._FIRST_REQUEST_SECONDS", 0.3)
    monkeypatch.setattr("cloud_server.api._BODY_SECONDS", 0.3)
    unfinished = b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\n"
    with HttpsFront(deployment, broker_url=BROKER) as door:
        assert said_by(door, b"") == b""
        assert said_by(door, unfinished) == b""
        late = said_by(door, unfinished + b"Content-Length: 100\r\nConnection: close\r\n\r\n{")
    assert late.startswith(b"HTTP/1.1 400")
    assert b"takes too long" in late


def said_by(door: HttpsFront, request: bytes) -> bytes:
    """All that the public port says to these bytes before it closes the connection."""
    with (
        socket.create_connection(("127.0.0.1", door.public_port), timeout=20) as plain,
        unverified_context().wrap_socket(plain) as connection,
    ):
        connection.sendall(request)
        found = b""
        while piece := connection.recv(4096):
            found += piece
    return found


def test_enrolment_with_a_wrong_pin_sends_nothing(
    front: HttpsFront, deployment: Deployment, tmp_path: Path
) -> None:
    token = msgspec.structs.replace(mint(deployment, front, "pinned"), ca_sha256="0" * 64)
    with pytest.raises((EnrolmentError, TrustError)):
        enrol(str(token), tmp_path / "device", clock=CLOCK)
    assert deployment.registry.status("pinned") == ""


def test_server_speaks_tls_13_only(front: HttpsFront) -> None:
    context = unverified_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    for port in (front.public_port, front.device_port):
        with socket.create_connection(("127.0.0.1", port)) as plain, pytest.raises(ssl.SSLError):
            context.wrap_socket(plain, server_hostname="cloud.test")


def test_port_that_is_taken_is_an_error(deployment: Deployment, front: HttpsFront, tmp_path: Path) -> None:
    settings = CloudSettings(listen=ListenSettings(public_port=0, device_port=front.device_port))
    with (
        initialise(tmp_path / "other", settings) as other,
        pytest.raises(TransportError, match="cannot listen"),
    ):
        HttpsFront(other, broker_url=BROKER)


def test_front_that_was_stopped_does_not_answer(tmp_path: Path) -> None:
    settings = CloudSettings(listen=ListenSettings(public_port=0, device_port=0))
    with initialise(tmp_path / "state", settings) as made:
        served = HttpsFront(made, broker_url=BROKER)
        served.stop()
        served.stop()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", served.public_port)).close()


def test_token_of_an_open_port_is_refused(deployment: Deployment) -> None:
    with pytest.raises(ConfigurationError, match="fixed port"):
        deployment.door()
