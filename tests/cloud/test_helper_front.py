"""The helper's HTTPS port, its folder and its command, and the aggregator's way to it: over real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_server.cli import main
from cloud_server.deployment import initialise
from cloud_server.helper.folder import TLS_NAME, HelperFolder, HelperSettings
from cloud_server.helper.serving import serve
from cloud_server.secure.helper_client import HttpsHelper, read_helper_file
from cloud_server.service import Running, run
from cloud_server.settings import BrokerSettings, CloudSettings, ListenSettings, RunSettings, SecureSettings
from process.clock import SystemClock
from process.service_manager import ServiceManager
from tests.cloud.helper_lab import FLEET, TENANT, HelperLab
from wire.errors import ConfigurationError, TrustError
from wire.helper import MAX_QUESTION_BYTES, SUM_PATH, HelperAnswer, HelperRefusal
from wire.messages import Order
from wire.primitives import KemPrivateKey, SigningKey
from wire.ring import ring_vector


def made(folder: Path, *, min_devices: int = 3) -> HelperFolder:
    arguments = ["--tenant", TENANT, "--fleet", FLEET, "--port", "0", "--min-devices", str(min_devices)]
    assert main(["helper", "init", "--state", str(folder), *arguments]) == 0
    return HelperFolder(folder)


class Served:
    """A helper that answers on a port of this machine."""

    def __init__(self, folder: HelperFolder) -> None:
        self.folder, self.port = folder, 0
        self._stop, self._ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def _serve(self) -> None:
        serve(self.folder, SystemClock(), stop=self._stop, on_ready=self._note)

    def _note(self, port: int) -> None:
        self.port = port
        self._ready.set()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def client(self) -> HttpsHelper:
        return HttpsHelper(
            f"https://127.0.0.1:{self.port}", self.folder.handed_out, tenant=TENANT, fleet=FLEET
        )

    def post(self, body: bytes | Iterator[bytes], token: str | None) -> int:
        """The status of a question that anybody asks."""
        context = ssl.create_default_context(cafile=str(self.folder.handed_out / "ca.pem"))
        context.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=60)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            connection.request("POST", SUM_PATH, body, headers, encode_chunked=not isinstance(body, bytes))
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    helper = Served(made(tmp_path / "helper"))
    yield helper
    helper.stop()


def rostered(folder: HelperFolder, count: int, tmp_path: Path) -> HelperLab:
    """Devices of the folder's roster, which seal to its key."""
    lab = HelperLab(count)
    lab.kem = folder.key()
    lab.terms = lab.order(helper_key_id=lab.kem.key_id).helped  # type: ignore[assignment]
    lines = "\n".join(f"{name},{key.public_bytes.hex()}" for name, key in lab.keys.items())
    (tmp_path / "roster.csv").write_text(f"# name, update key\n{lines}\n")
    assert (
        main(["helper", "device", "import", str(tmp_path / "roster.csv"), "--state", str(folder.root)]) == 0
    )
    return lab


def said(client: HttpsHelper, question: bytes, total_bytes: int) -> HelperAnswer | HelperRefusal | None:
    client.ask(question, total_bytes)
    assert client._thread is not None
    client._thread.join(60)
    return client.take(question)


def test_aggregator_gets_the_sum_over_https(served: Served, tmp_path: Path) -> None:
    lab = rostered(served.folder, 4, tmp_path)
    sent = [lab.mask(name) for name in lab.names]
    question = lab.question([sealed for _, sealed in sent])
    answer = said(served.client(), question, lab.size * lab.ring.dtype.itemsize)
    assert isinstance(answer, HelperAnswer)
    total = sum(masked.astype(int) for masked, _ in sent) - ring_vector(answer.total, lab.ring, lab.size)
    wanted = sum(vector.astype(int) for vector in lab.vectors.values())
    assert ((total - wanted) % (1 << lab.ring.bits) == 0).all()


def test_refusal_comes_over_https_and_an_answer_is_taken_once(served: Served, tmp_path: Path) -> None:
    lab = rostered(served.folder, 3, tmp_path)
    client, size = served.client(), lab.size * lab.ring.dtype.itemsize
    few = lab.question(lab.seeds(lab.names[:2]))
    assert said(client, few, size) == HelperRefusal(reason="too_few")
    assert client.take(few) is None
    whole = lab.question(lab.seeds(lab.names))
    assert isinstance(said(client, whole, size), HelperAnswer)
    assert client.take(few) is None
    assert said(client, lab.question([*lab.seeds(lab.names[:2]), b""]), size) == HelperRefusal(
        reason="already_answered"
    )


@pytest.mark.parametrize("token", [None, "", "wrong", "é"])
def test_stranger_is_told_nothing(served: Served, token: str | None) -> None:
    assert served.post(b"\xa0", token) == 401


def test_stranger_who_insists_is_made_to_wait(served: Served) -> None:
    assert {served.post(b"", "wrong") for _ in range(70)} == {401, 429}
    assert served.post(b"", (served.folder.handed_out / "token").read_text()) == 200


def test_question_without_end_is_given_up(served: Served) -> None:
    token = (served.folder.handed_out / "token").read_text()

    def endless() -> Iterator[bytes]:
        for _ in range(MAX_QUESTION_BYTES // 2**20 + 1):
            yield bytes(2**20)

    assert served.post(endless(), token) == 413


def test_helper_that_is_not_there_says_nothing_and_raises_nothing(tmp_path: Path) -> None:
    folder = made(tmp_path / "helper")
    client = HttpsHelper("https://127.0.0.1:9", folder.handed_out, tenant=TENANT, fleet=FLEET)
    assert said(client, b"question", 100) is None


def test_somebody_else_in_the_helpers_place_is_not_asked(served: Served, tmp_path: Path) -> None:
    """Another authority under the same name: the token never leaves."""
    other = made(tmp_path / "other")
    client = HttpsHelper(
        f"https://127.0.0.1:{served.port}", other.handed_out, tenant=TENANT, fleet=FLEET
    )  # fmt: skip
    assert said(client, b"question", 100) is None
    assert TLS_NAME == "shoal-helper"


def test_helper_goes_on_after_a_restart(tmp_path: Path) -> None:
    folder = made(tmp_path / "helper")
    lab = rostered(folder, 4, tmp_path)
    size = lab.size * lab.ring.dtype.itemsize
    seeds = lab.seeds(lab.names)
    first = Served(folder)
    answer = said(first.client(), lab.question(seeds), size)
    first.stop()
    second = Served(folder)
    try:
        assert said(second.client(), lab.question(seeds), size) == answer
        refused = said(second.client(), lab.question(seeds[:3]), size)
        assert refused == HelperRefusal(reason="already_answered")
    finally:
        second.stop()


# --- folder and command ---


def test_init_makes_a_folder_once_and_shows_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "helper")
    assert {path.name for path in folder.handed_out.iterdir()} == {"helper.json", "ca.pem", "token"}
    assert all((folder.root / name).stat().st_mode & 0o077 == 0 for name in ("kem.key", "token.sha256"))
    token = (folder.handed_out / "token").read_text()
    assert token not in capsys.readouterr().err
    assert main(["helper", "init", "--state", str(folder.root)]) != 0
    assert main(["helper", "show", "--json", "--state", str(folder.root)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["key"] == folder.key().public_key.public_bytes.hex()
    assert (shown["devices"], shown["answered_rounds"]) == (0, 0)


def test_roster_command_adds_lists_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path / "helper")
    state = ["--state", str(folder.root)]
    key = SigningKey(b"k" * 32).public_bytes.hex()
    assert main(["helper", "device", "add", "camera-1", key, *state]) == 0
    assert main(["helper", "device", "add", "camera-2", key, *state]) != 0
    assert main(["helper", "device", "add", "camera/2", key, *state]) != 0
    assert main(["helper", "device", "add", "camera-2", "00", *state]) != 0
    capsys.readouterr()
    assert main(["helper", "device", "list", "--json", *state]) == 0
    assert [(row["device"], row["key"]) for row in json.loads(capsys.readouterr().out)] == [("camera-1", key)]
    assert main(["helper", "device", "remove", "camera-1", *state]) == 0
    assert main(["helper", "device", "remove", "camera-1", *state]) != 0


def test_import_of_a_bad_line_takes_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path / "helper")
    key = SigningKey(b"k" * 32).public_bytes.hex()
    (tmp_path / "roster").write_text(f"camera-1 {key}\ncamera-2 zz\n")
    assert main(["helper", "device", "import", str(tmp_path / "roster"), "--state", str(folder.root)]) != 0
    assert "line 2" in capsys.readouterr().err
    store = folder.open_store()
    assert store.roster() == []
    store.close()


def test_init_that_fails_leaves_nothing(tmp_path: Path) -> None:
    folder = HelperFolder(tmp_path / "helper")
    with pytest.raises(TrustError):
        folder.create(HelperSettings(), algorithm="rsa", now=0.0)
    assert list(tmp_path.iterdir()) == []
    folder.root.mkdir()
    with pytest.raises(TrustError):
        folder.create(HelperSettings(), algorithm="rsa", now=0.0)
    assert list(folder.root.iterdir()) == []


def test_service_manager_hears_of_start_and_stop(tmp_path: Path) -> None:
    folder, address = made(tmp_path / "helper"), str(tmp_path / "notify")
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(30)
        code = serve(
            folder,
            SystemClock(),
            stop=stop,
            on_ready=lambda port: stop.set(),
            manager=ServiceManager(address),
        )
        heard = [manager.recv(100), manager.recv(100)]
    assert code == 0
    assert heard == [b"READY=1", b"STOPPING=1"]


def test_folder_has_one_helper_that_answers(served: Served) -> None:
    with pytest.raises(ConfigurationError, match="running"):
        serve(served.folder, SystemClock(), stop=threading.Event())


def test_folder_that_is_no_helpers_is_refused(tmp_path: Path) -> None:
    for command in (["show"], ["run"], ["device", "list"]):
        assert main(["helper", *command, "--state", str(tmp_path)]) != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["", "http://h:1", "https://", "https://u@h", "https://h/path", "https://h:x"]
)
def test_address_that_is_none_of_a_helper_is_refused(url: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "helper")
    with pytest.raises(ConfigurationError):
        HttpsHelper(url, folder.handed_out, tenant=TENANT, fleet=FLEET)


@pytest.mark.parametrize("name", ["helper.json", "ca.pem", "token"])
def test_file_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "helper")
    (folder.handed_out / name).unlink()
    with pytest.raises(ConfigurationError, match="for-aggregator"):
        HttpsHelper("https://h:1", folder.handed_out, tenant=TENANT, fleet=FLEET)


def test_file_of_another_fleets_helper_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "helper")
    path = folder.handed_out / "helper.json"
    assert read_helper_file(path, tenant=TENANT, fleet=FLEET).key_id == folder.key().key_id
    with pytest.raises(ConfigurationError):
        read_helper_file(path, tenant=TENANT, fleet="other")
    damaged = json.loads(path.read_bytes())
    damaged["helper"]["public"] = KemPrivateKey.generate().public_key.public_bytes.hex()
    path.write_text(json.dumps(damaged))
    with pytest.raises(ConfigurationError):
        read_helper_file(path, tenant=TENANT, fleet=FLEET)


@pytest.mark.parametrize(
    ("secure", "said"),
    [
        (SecureSettings(policy="two_server"), "needs a helper"),
        (SecureSettings(policy="two_server", helper_url="https://h:1"), "helper's files"),
    ],
)
def test_helper_that_is_not_there_is_one_error_before_anything_starts(
    secure: SecureSettings, said: str, tmp_path: Path
) -> None:
    settings = CloudSettings(
        listen=ListenSettings(public_port=0, device_port=0),
        broker=BrokerSettings(kind="embedded", port=0),
        run=RunSettings(strategy="FedAvg"),
        secure=secure,
    )
    ready: list[Running] = []
    with initialise(tmp_path / "state", settings) as deployment:
        with pytest.raises(ConfigurationError, match=said):
            run(deployment, stop=threading.Event(), on_ready=ready.append)
        assert list(deployment.folder.broker.iterdir()) == []
    assert ready == []


def test_helper_is_trusted_by_the_offline_key_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "helper")
    file = str(folder.handed_out / "helper.json")
    with initialise(tmp_path / "cloud", CloudSettings(tenant=TENANT, fleet=FLEET)) as deployment:
        offline = deployment.folder.keys / "offline"
    (offline / "targets.key").rename(tmp_path / "targets.key")
    assert main(["helper", "trust", file, "--state", str(tmp_path / "cloud")]) != 0
    assert "targets" in capsys.readouterr().err
    (tmp_path / "targets.key").rename(offline / "targets.key")
    assert main(["helper", "trust", file, "--state", str(tmp_path / "cloud")]) == 0
    assert folder.key().key_id.hex() in capsys.readouterr().err
    other = made(tmp_path / "other")
    named = (other.handed_out / "helper.json").read_text().replace(f'"{FLEET}"', '"else"')
    (tmp_path / "foreign.json").write_text(named)
    assert main(["helper", "trust", str(tmp_path / "foreign.json"), "--state", str(tmp_path / "cloud")]) != 0


def test_lab_orders_name_the_helper() -> None:
    """The lab itself: its orders carry the terms that its questions do."""
    lab = HelperLab(3)
    order: Order = lab.order()
    assert order.helped == lab.terms
    assert order.ring_terms == lab.terms
