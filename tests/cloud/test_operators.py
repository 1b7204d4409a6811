"""The operators' interface over real TLS: nothing without a token, roles, limits, names it is called by, the books."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cloud_server.cli import main
from cloud_server.db.audit import load_audit, newest_entry, newest_head
from cloud_server.deployment import Deployment, initialise
from cloud_server.operators.accounts import Role, add_operator, remove_operator
from cloud_server.operators.front import OperatorsFront
from cloud_server.operators.throttle import MAX_FAILURES, FailureLimit
from cloud_server.registry import add_device
from cloud_server.service import Running, run
from cloud_server.settings import (
    AuditSettings,
    BrokerSettings,
    CloudSettings,
    ListenSettings,
    OperatorSettings,
)
from tests.fleet.waiting import wait_for
from wire.errors import ConfigurationError
from wire.primitives import SigningKey

LOOK = ("/whoami", "/status", "/devices", "/devices/watch", "/rounds", "/releases", "/audit")
ACT = (
    ("POST", "/devices/watch/quarantine"),
    ("POST", "/devices/watch/approve"),
    ("POST", "/devices/watch/revoke"),
    ("POST", "/releases/1/promote"),
    ("POST", "/rings/stable/rollback"),
    ("POST", "/run/pause"),
    ("POST", "/run/resume"),
)
GOVERN = (("GET", "/users"), ("POST", "/users"), ("DELETE", "/users/nobody"))


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    headers: dict[str, str]


class Client:
    """Speaks HTTPS to one front."""

    def __init__(self, deployment: Deployment, port: int) -> None:
        self.deployment = deployment
        self._port = port
        self._context = ssl.create_default_context(cadata=deployment.authority.certificate_pem)

    def ask(self, method: str, path: str, token: str = "", body: object = None, **headers: str) -> Answer:
        connection = http.client.HTTPSConnection("localhost", self._port, context=self._context, timeout=30)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body)
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            text = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, json.loads(text) if text else None, found)
        finally:
            connection.close()

    def do(self, method: str, path: str, token: str, body: object = None) -> Answer:
        return self.ask(method, "/v1/operator" + path, token, body)

    def kinds(self) -> list[str]:
        with self.deployment.database.read() as connection:
            return [entry.kind for entry in load_audit(connection)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with initialise(tmp_path_factory.mktemp("cloud") / "state", CloudSettings()) as made:
        with made.database.transaction() as connection:
            key = SigningKey.generate().verify_key
            add_device(connection, "watch", key, now=made.clock.now())
        yield made


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with OperatorsFront(deployment, "127.0.0.1:0") as front:
        yield Client(deployment, front.port)


@pytest.fixture(scope="module")
def tokens(deployment: Deployment) -> dict[str, str]:
    with deployment.database.transaction() as connection:
        return {str(role): add_operator(connection, f"the-{role}", role, 1.0) for role in Role}


def test_only_healthz_answers_without_a_token(client: Client) -> None:
    assert client.ask("GET", "/healthz").status == 200
    paths = ["/", "/readyz", "/v1/operator/status", "/v1/operator/nonsense", "/docs", "/openapi.json"]
    answers = [client.ask("GET", path) for path in paths]
    assert {answer.status for answer in answers} == {401}
    assert len({json.dumps(answer.body) for answer in answers}) == 1, "whether a path exists is not told"


def test_readyz_tells_operators_what_the_checks_found(client: Client, tokens: dict[str, str]) -> None:
    answer = client.ask("GET", "/readyz", tokens["viewer"])
    assert (answer.status, answer.body) == (200, {"status": "ready", "findings": []})


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic YTpi",
        "Bearer shoal-operator-" + "A" * 43,
        "Bearer " + "x" * 5000,
        "bearer é",
    ],
)
def test_wrong_token_is_the_same_answer_as_none(client: Client, header: str) -> None:
    answer = client.ask("GET", "/v1/operator/status", Authorization=header)
    assert (answer.status, answer.body["error"]) == (401, "token")


def test_cookie_is_no_token(client: Client, tokens: dict[str, str]) -> None:
    answer = client.ask(
        "GET", "/v1/operator/status", Cookie=f"token={tokens['admin']}; session={tokens['admin']}"
    )
    assert answer.status == 401


@pytest.mark.parametrize("role", list(Role))
def test_role_may_what_it_may_and_no_more(client: Client, tokens: dict[str, str], role: Role) -> None:
    token = tokens[role]
    assert {client.do("GET", path, token).status for path in LOOK} == {200}
    acted = {client.do(method, path, token, {}).status for method, path in ACT if "revoke" not in path}
    governed = {client.do(method, path, token, {}).status for method, path in GOVERN}
    assert (403 in acted, acted == {403}) == (
        (False, False) if role.includes(Role.OPERATOR) else (True, True)
    )
    assert (403 in governed, governed == {403}) == ((False, False) if role is Role.ADMIN else (True, True))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:443"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "localhost"}, 200),
        ({"Host": "shoal-cloud:8445"}, 200),
        ({"Host": "[::1]:8445"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:8445", "Origin": "http://localhost:8445"}, 403),
        ({"Host": "localhost:8445", "Origin": "https://localhost:8445"}, 200),
    ],
)
def test_foreign_host_or_origin_is_refused(
    client: Client, tokens: dict[str, str], headers: dict[str, str], status: int
) -> None:
    assert client.ask("GET", "/v1/operator/whoami", tokens["viewer"], **headers).status == status


def test_address_that_fails_too_often_waits_and_is_in_the_books_once(
    client: Client, tokens: dict[str, str]
) -> None:
    before = client.kinds().count("operator.refused")
    statuses = [client.ask("GET", "/v1/operator/status").status for _ in range(MAX_FAILURES + 5)]
    assert statuses == [401] * MAX_FAILURES + [429] * 5
    turned_away = client.do("GET", "/whoami", tokens["admin"])
    assert turned_away.status == 429
    assert 0 < int(turned_away.headers["retry-after"]) <= 61
    assert client.ask("GET", "/healthz").status == 200
    assert client.kinds().count("operator.refused") == before + 1


def test_failures_are_forgotten_after_the_window_and_by_address() -> None:
    limit = FailureLimit(failures=2, window_seconds=10.0, addresses=3)
    assert [limit.note_failure("a", now) for now in (0.0, 1.0)] == [False, True]
    assert limit.wait_seconds("a", 2.0) == 8.0
    assert limit.wait_seconds("b", 2.0) == 0.0
    assert limit.wait_seconds("a", 10.5) == 0.0
    for name in "bcd":
        limit.note_failure(name, 3.0)
    assert limit.wait_seconds("a", 3.5) == 0.0, "the oldest left a full table"


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        ({"reason": "x", "more": 1}, "application/json", 400),
        ({"reason": "x" * 513}, "application/json", 400),
        ({"reason": 5}, "application/json", 400),
        ([], "application/json", 400),
        ({"reason": "x" * 70_000}, "application/json", 400),
        ({"reason": "x"}, "text/plain", 400),
        ({"reason": "x"}, "application/x-www-form-urlencoded", 400),
        ({"reason": "x"}, "application/json; charset=utf-8", 200),
    ],
)
def test_body_that_is_not_what_it_should_be_is_refused(
    client: Client, tokens: dict[str, str], body: object, content_type: str, status: int
) -> None:
    path = "/v1/operator/devices/watch/quarantine"
    assert client.ask("POST", path, tokens["operator"], body, Content_Type=content_type).status == status


def test_action_stands_in_the_books_under_a_pseudonym(client: Client, tokens: dict[str, str]) -> None:
    with client.deployment.database.read() as connection:
        before = sum(1 for _ in load_audit(connection))
    answer = client.do("POST", "/devices/watch/quarantine", tokens["operator"], {"reason": "it smells"})
    assert (answer.status, answer.body["status"], answer.body["reason"]) == (200, "quarantined", "it smells")
    assert client.do("POST", "/devices/watch/approve", tokens["operator"]).body["status"] == "approved"
    with client.deployment.database.read() as connection:
        entries = list(load_audit(connection, after=before))
    asked = [entry.facts for entry in entries if entry.kind == "operator.asked"]
    assert [facts["action"] for facts in asked] == ["device.quarantine", "device.approve"]
    assert {facts["device"] for facts in asked} == {client.deployment.registry.show("watch").pseudonym}
    text = "".join(entry.body for entry in entries)
    assert "the-operator" not in text
    assert "smells" not in text


def test_unknown_things_name_the_way_out(client: Client, tokens: dict[str, str]) -> None:
    answer = client.do("POST", "/devices/ghost/revoke", tokens["operator"], {})
    assert (answer.status, "device list" in answer.body["hint"]) == (409, True)
    assert client.do("POST", "/releases/9/promote", tokens["operator"], {}).status == 409
    assert client.do("POST", "/rings/a%20b/rollback", tokens["operator"], {}).status == 400
    assert client.do("GET", "/rounds/main/1", tokens["viewer"]).status == 409


def test_first_use_of_a_token_is_a_login(client: Client) -> None:
    with client.deployment.database.transaction() as connection:
        token = add_operator(connection, "late", Role.VIEWER, 1.0)
    before = client.kinds().count("operator.login")
    assert {client.do("GET", "/whoami", token).status for _ in range(3)} == {200}
    assert client.kinds().count("operator.login") == before + 1


def test_admin_adds_and_removes_and_the_token_ends_at_once(client: Client, tokens: dict[str, str]) -> None:
    added = client.do("POST", "/users", tokens["admin"], {"name": "ann", "role": "viewer"})
    assert added.status == 200
    token = added.body["token"]
    assert client.do("GET", "/whoami", token).body["name"] == "ann"
    assert client.do("POST", "/users", tokens["admin"], {"name": "ann", "role": "viewer"}).status == 409
    assert client.do("POST", "/users", tokens["admin"], {"name": "bob", "role": "king"}).status == 400
    assert client.do("DELETE", "/users/ann", tokens["admin"]).status == 200
    assert client.do("GET", "/whoami", token).status == 401
    shown = json.dumps(client.do("GET", "/users", tokens["admin"]).body)
    assert "token" not in shown
    assert "pseudonym" not in shown


def test_no_token_is_kept(deployment: Deployment, tokens: dict[str, str]) -> None:
    data = b"".join(path.read_bytes() for path in deployment.folder.root.glob("cloud.db*"))
    assert [role for role, token in tokens.items() if token.encode() in data] == []
    assert b"the-admin" in data


def test_last_admin_stays(tmp_path: Path) -> None:
    with initialise(tmp_path / "state", CloudSettings()) as made:
        with made.database.transaction() as connection, pytest.raises(ConfigurationError, match="last admin"):
            remove_operator(connection, "admin", 1.0)
        with made.database.transaction() as connection:
            add_operator(connection, "second", Role.ADMIN, 1.0)
            remove_operator(connection, "admin", 1.0)
            with pytest.raises(ConfigurationError, match="last admin"):
                remove_operator(connection, "second", 1.0)


def test_init_makes_the_first_admin_and_user_commands_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setenv("SHOAL_STATE", str(state))
    assert main(["init"]) == 0
    place = state / "admin.token"
    assert place.stat().st_mode & 0o777 == 0o600
    assert 'listen = "127.0.0.1:8445"' in (state / "settings.toml").read_text()
    capsys.readouterr()
    assert main(["user", "add", "ann", "--role", "operator", "--output", str(tmp_path / "ann")]) == 0
    assert (tmp_path / "ann").stat().st_mode & 0o777 == 0o600
    assert main(["user", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["role"]) for row in rows] == [("admin", "admin"), ("ann", "operator")]
    with Deployment.open(state) as deployment, OperatorsFront(deployment, "127.0.0.1:0") as front:
        client = Client(deployment, front.port)
        first = client.do("GET", "/whoami", place.read_text().strip())
        assert (first.status, first.body["role"]) == (200, "admin")
        assert main(["user", "remove", "ann"]) == 0
        assert client.do("GET", "/whoami", (tmp_path / "ann").read_text().strip()).status == 401
    assert main(["user", "remove", "ann"]) == 2
    assert main(["user", "add", "a b"]) == 2


@pytest.mark.parametrize("listen", ["8445", "127.0.0.1:", "127.0.0.1:99999", ":1"])
def test_address_that_is_none_is_refused(deployment: Deployment, listen: str) -> None:
    with pytest.raises(ConfigurationError, match=r"operators\.listen"):
        OperatorsFront(deployment, listen)


def test_service_answers_operators_and_signs_what_happens(tmp_path: Path) -> None:
    settings = CloudSettings(
        listen=ListenSettings(public_port=0, device_port=0),
        broker=BrokerSettings(kind="embedded", port=0),
        operators=OperatorSettings(listen="127.0.0.1:0"),
        audit=AuditSettings(head_entries=1),
    )
    stop, running = threading.Event(), list[Running]()
    with initialise(tmp_path / "state", settings) as made:
        token = made.folder.first_admin.read_text().strip()
        serving = threading.Thread(target=lambda: run(made, stop=stop, on_ready=running.append), daemon=True)
        serving.start()
        try:
            wait_for(lambda: bool(running), "the service")
            client = Client(made, running[0].operators_port)
            assert client.ask("GET", "/healthz").status == 200
            assert client.do("GET", "/status", token).body["is_running"] is False, (
                "nobody holds the lock here"
            )

            def is_signed() -> bool:
                with made.database.read() as connection:
                    head, last = newest_head(connection), newest_entry(connection)
                return head is not None and last is not None and head.seq == last.seq

            wait_for(is_signed, "a signed head")
        finally:
            stop.set()
            serving.join()
