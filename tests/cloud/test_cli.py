"""`shoal-cloud` as people and scripts use it: data on stdout, talk on stderr, clear errors for wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_server.cli import main
from cloud_server.db.grid_steps import BEGIN, GridStep, insert_step, load_steps
from cloud_server.deployment import Deployment
from cloud_server.enrolment.service import Welcome
from cloud_server.layout import StateFolder
from models.bundle import Bundle
from tests.cloud.deployment import Newcomer
from tests.cloud.small_bundle import make_candidate, write_bundle
from wire.enrolment import EnrolmentToken
from wire.errors import EnrolmentError


@dataclass(frozen=True)
class Printed:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Printed]


@pytest.fixture
def shoal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command on a fresh state folder."""
    monkeypatch.setenv("SHOAL_STATE", str(tmp_path / "state"))

    def run(*words: str) -> Printed:
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Printed(code, captured.out, captured.err)

    return run


@pytest.fixture
def made(shoal: Run) -> Run:
    """The same, on a state folder that `init` made."""
    assert shoal("init", "--tenant", "acme", "--fleet", "watches", "--public-port", "9443").code == 0
    return shoal


def state_folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def enrol(tmp_path: Path, device: str, token: str) -> None:
    with Deployment.open(state_folder(tmp_path)) as deployment:
        welcome = Welcome("acme", "watches", "shoal-cloud", "https://x:1", "mqtt://x:1", "stable", 10)
        request = Newcomer(device).request(EnrolmentToken.parse(token))
        deployment.enrolment(welcome).enrol(request)


def import_unchecked(tmp_path: Path) -> str:
    """Imports a bundle whose graphs nobody will run, and releases it; returns its graphs' hash."""
    bundle = write_bundle(tmp_path / "bundle")
    with Deployment.open(state_folder(tmp_path)) as deployment:
        deployment.publisher.import_model(bundle)
        deployment.publisher.publish(deployment.publisher.propose_bundle(bundle).version)
    return bundle.manifest.graphs_sha256


def test_init_makes_a_folder_that_every_command_reads(made: Run, tmp_path: Path) -> None:
    state = state_folder(tmp_path)
    assert (state / "FORMAT").read_text() == "shoal-cloud 1\n"
    assert {path.name for path in state.iterdir()} >= {"settings.toml", "keys", "ca", "cloud.db", "artefacts"}
    assert state.stat().st_mode & 0o777 == 0o700
    settings = (state / "settings.toml").read_text()
    assert 'tenant = "acme"' in settings
    assert "public_port = 9443" in settings
    status = made("status", "--json").json
    assert (status["tenant"], status["fleet"], status["devices"], status["rings"]) == (
        "acme",
        "watches",
        {},
        {},
    )
    assert status["expiring"] == []
    assert not status["is_running"]


def test_init_twice_is_refused_and_changes_nothing(made: Run, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in state_folder(tmp_path).rglob("*.key")}
    again = made("init")
    assert (again.code, again.out) == (2, "")
    assert "not empty" in again.err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "words",
    [
        ("--tenant", "a/b"),
        ("--fleet", ""),
        ("--public-port", "70000"),
        ("--public-port", "many"),
        ("--broker", "carrier-pigeon"),
    ],
)
def test_init_with_a_bad_option_makes_nothing(shoal: Run, tmp_path: Path, words: tuple[str, str]) -> None:
    printed = shoal("init", *words)
    assert printed.code == 2
    assert printed.out == ""
    assert "error:" in printed.err
    assert not state_folder(tmp_path).exists()


def test_init_takes_settings_from_a_file(shoal: Run, tmp_path: Path) -> None:
    file = tmp_path / "base.toml"
    file.write_text('[run]\nquorum = 7\n[train]\ncodec = "int4"\n')
    assert shoal("init", "--settings", str(file), "--fleet", "x").code == 0
    with Deployment.open(state_folder(tmp_path)) as deployment:
        assert deployment.settings.run.quorum == 7
        assert deployment.settings.train.config().codec == "int4"
        assert deployment.settings.fleet == "x"


def test_device_add_prints_a_token_and_nothing_else(made: Run) -> None:
    printed = made("device", "add", "watch-1")
    token = EnrolmentToken.parse(printed.out)
    assert printed.out == f"{token}\n"
    assert (token.device, token.url, token.tls_name) == ("watch-1", "https://127.0.0.1:9443", "shoal-cloud")
    assert "shoal-edge enroll" in printed.err


def test_device_add_writes_each_numbered_token_into_a_file_of_its_own(made: Run, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    printed = made("device", "add", "cam-{n:02}", "--count", "3", "--output-dir", str(folder))
    assert (printed.code, printed.out) == (0, "")
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["cam-01.token", "cam-02.token", "cam-03.token"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    tokens = [EnrolmentToken.parse(file.read_text()) for file in files]
    assert [token.device for token in tokens] == ["cam-01", "cam-02", "cam-03"]
    assert len({token.secret for token in tokens}) == 3
    assert made("device", "add", "cam-{n:02}", "--count", "2", "--json").json[0]["device"] == "cam-04"
    again = made("device", "add", "--count", "3", "--output-dir", str(folder))
    assert again.code == 0
    assert (folder / "1.token").exists()
    refused = made("device", "add", "--count", "3", "--output-dir", str(folder))
    assert refused.code == 2
    assert "there already" in refused.err


def test_devices_of_a_token_of_many_uses_wait_in_a_queue(made: Run, tmp_path: Path) -> None:
    token = made("device", "add", "door-*", "--uses", "4").out.strip()
    for name in ("door-1", "door-2", "door-3"):
        enrol(tmp_path, name, token)
    pending = made("device", "list", "--pending", "--json").json
    assert [row["device"] for row in pending] == ["door-1", "door-2", "door-3"]
    assert {row["enrolled_with"] for row in pending} == {EnrolmentToken.parse(token).token_id}
    waiting = made("status")
    assert "3 devices wait for approval" in waiting.err
    assert made("device", "approve", "door-1", "door-2").code == 0
    assert made("device", "deny", "door-3").code == 0
    assert made("device", "list", "--pending", "--json").json == []
    rows = {row["device"]: (row["status"], row["reason"]) for row in made("device", "list", "--json").json}
    assert rows == {"door-1": ("approved", ""), "door-2": ("approved", ""), "door-3": ("revoked", "denied")}
    late = made("device", "deny", "door-1")
    assert late.code == 2
    assert "does not wait for approval" in late.err


def test_misspelt_name_among_many_changes_nothing(made: Run, tmp_path: Path) -> None:
    token = made("device", "add", "--uses", "2").out.strip()
    enrol(tmp_path, "one", token)
    assert made("device", "approve", "one", "tow").code == 2
    assert made("device", "show", "one", "--json").json["status"] == "quarantined"


def test_token_that_was_claimed_twice_stands_in_the_status_until_somebody_decides(
    made: Run, tmp_path: Path
) -> None:
    token = made("device", "add").out.strip()
    enrol(tmp_path, "first", token)
    with pytest.raises(EnrolmentError):
        enrol(tmp_path, "second", token)
    alarmed = made("status", "--json")
    assert alarmed.json["claimed_twice"] == ["first"]
    assert "the token of first was claimed twice" in alarmed.err
    assert made("device", "approve", "first").code == 0
    quiet = made("status", "--json")
    assert (quiet.json["claimed_twice"], quiet.json["pending"]) == ([], 0)


@pytest.mark.parametrize(
    "words",
    [
        ("watch", "--count", "2"),
        ("a/b",),
        ("aggregator",),
        ("watch", "--uses", "2"),
        ("cam-{x}", "--count", "2"),
        ("--output", "x", "--output-dir", "y"),
    ],
)
def test_device_add_that_cannot_be_makes_no_token(made: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    refused = made("device", "add", *words)
    assert (refused.code, refused.out) == (2, "")
    assert "hint:" in refused.err
    with Deployment.open(state_folder(tmp_path)) as deployment, deployment.database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM tokens").scalar_one() == 0


def test_device_add_for_a_taken_name_is_refused(made: Run, tmp_path: Path) -> None:
    enrol(tmp_path, "watch", made("device", "add", "watch").out.strip())
    refused = made("device", "add", "watch")
    assert refused.code == 2
    assert "is taken" in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--broker", "nats"), "mosquitto"),
        (("--tenant", "a b"), "A-Za-z0-9_-"),
        (("--public-port", "99999"), "65535"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_init_with_a_wrong_option_says_what_is_wanted(
    shoal: Run, tmp_path: Path, words: tuple[str, str], said: str
) -> None:
    refused = shoal("init", *words)
    assert refused.code == 2
    assert "the command line: " in refused.err
    assert said in refused.err
    assert not state_folder(tmp_path).exists()


def test_address_or_ring_that_cannot_be_is_refused_before_anything_is_made(made: Run) -> None:
    refused = made("device", "add", "watch-1", "--url", "foo")
    assert (refused.code, refused.out) == (2, "")
    assert "https://host:port" in refused.err
    assert made("model", "import", "bundle", "--ring", "a b").code == 2
    assert made("release", "promote", "1", "--ring", "a/b").code == 2


def test_server_that_listens_everywhere_needs_a_name_for_devices(shoal: Run, tmp_path: Path) -> None:
    assert shoal("init", "--host", "0.0.0.0").code == 0
    refused = shoal("device", "add", "watch-1")
    assert refused.code == 2
    assert "listen.advertise" in refused.err
    with Deployment.open(
        state_folder(tmp_path), {"SHOAL_CLOUD_LISTEN_ADVERTISE": "cloud.example"}
    ) as deployment:
        assert deployment.door().url == "https://cloud.example:8443"
        assert deployment.broker_url("0.0.0.0", 1883) == "mqtt://cloud.example:1883"
        assert deployment.broker_url("10.0.0.7", 1883) == "mqtt://10.0.0.7:1883"


def test_device_add_of_many_tokens_as_json_or_in_a_file(made: Run, tmp_path: Path) -> None:
    printed = made("device", "add", "--count", "3", "--url", "https://cloud.example:443", "--json")
    tokens = [EnrolmentToken.parse(entry["token"]) for entry in printed.json]
    assert len({token.token_id for token in tokens}) == 3
    assert {token.url for token in tokens} == {"https://cloud.example:443"}
    file = tmp_path / "tokens"
    written = made("device", "add", "--count", "2", "--output", str(file))
    assert written.out == ""
    assert file.stat().st_mode & 0o777 == 0o600
    assert [EnrolmentToken.parse(line).device for line in file.read_text().splitlines()] == ["", ""]


@pytest.mark.parametrize(
    "words", [("a/b",), ("--count", "0"), ("a", "--count", "2"), ("a", "--uses", "2"), ("--hours", "-1")]
)
def test_device_add_with_bad_options_is_refused(made: Run, words: tuple[str, ...]) -> None:
    printed = made("device", "add", *words)
    assert (printed.code, printed.out) == (2, "")
    assert "error:" in printed.err


def test_device_goes_through_its_life(made: Run, tmp_path: Path) -> None:
    for name in ("watch-1", "watch-2"):
        enrol(tmp_path, name, made("device", "add", name).out)
    listed = made("device", "list", "--json").json
    assert [(row["device"], row["status"], row["presence"]) for row in listed] == [
        ("watch-1", "approved", ""),
        ("watch-2", "approved", ""),
    ]
    assert made("device", "quarantine", "watch-1", "--reason", "odd updates").code == 0
    assert made("device", "show", "watch-1", "--json").json["reason"] == "odd updates"
    assert made("device", "approve", "watch-1").code == 0
    assert made("device", "rename", "watch-1", "left wrist").code == 0
    assert made("device", "revoke", "watch-2").code == 0
    assert made("device", "approve", "watch-2").code == 2
    table = made("device", "list").out.splitlines()
    assert table[0].split() == [
        "DEVICE",
        "LABEL",
        "STATUS",
        "PRESENCE",
        "RELEASE",
        "VERSION",
        "LAST",
        "SEEN",
        "RING",
        "REASON",
    ]
    assert "left wrist" in table[1]
    assert "revoked" in table[2]
    assert made("status", "--json").json["devices"] == {"approved": 1, "revoked": 1}


@pytest.mark.parametrize(
    "words",
    [
        ("device", "show", "ghost"),
        ("device", "revoke", "ghost"),
        ("device", "rename", "ghost", "x"),
        ("release", "show", "9"),
        ("release", "promote", "9"),
        ("release", "rollback", "9"),
        ("release", "rollback"),
        ("round", "show", "1"),
        ("model", "show", "nothing"),
    ],
)
def test_thing_that_is_not_there_is_named(made: Run, words: tuple[str, ...]) -> None:
    printed = made(*words)
    assert (printed.code, printed.out) == (2, "")
    assert printed.err.startswith("error: ")
    assert "hint: " in printed.err


def test_model_is_imported_and_released(made: Run, tmp_path: Path, real_bundle: Bundle) -> None:
    bundle = real_bundle
    imported = made("model", "import", str(bundle.folder), "--json").json
    assert imported == {
        "name": "small",
        "graphs_sha256": bundle.manifest.graphs_sha256,
        "release_version": 1,
    }
    assert made("model", "import", str(bundle.folder), "--json").json == imported
    assert [row["name"] for row in made("model", "list", "--json").json] == ["small"]
    for name in ("small", bundle.manifest.graphs_sha256[:8]):
        assert made("model", "show", name, "--json").json["files"]["template.onnx"] > 0
    kept = state_folder(tmp_path) / "bundles" / bundle.manifest.graphs_sha256 / "manifest.json"
    assert kept.read_bytes() == bundle.manifest.to_bytes()
    assert made("status", "--json").json["rings"] == {"stable": 1}


def test_model_that_was_built_knows_its_labels_and_metrics(real_bundle: Bundle) -> None:
    assert real_bundle.manifest.task.labels == ("a", "b", "c")
    assert real_bundle.manifest.input_shape == (4,)
    assert real_bundle.release.metrics["accuracy_int8"] > 0.7


def test_model_whose_graphs_do_not_run_is_not_imported(made: Run, tmp_path: Path) -> None:
    printed = made("model", "import", str(write_bundle(tmp_path / "bundle").folder))
    assert (printed.code, printed.out) == (6, "")
    assert made("model", "list", "--json").json == []
    assert list((state_folder(tmp_path) / "bundles").iterdir()) == []


@pytest.mark.parametrize(
    ("source", "data", "said"),
    [
        ("no_such_package:make", "good", "cannot be imported"),
        ("models:make_model", "good", "has no function 'make_model'"),
        ("json:loads", "missing", "there is no "),
        ("broken_module:make", "good", "cannot be imported"),
        ("good_module:make_text", "good", "not a torch.nn.Module"),
        ("good_module:nothing", "good", "has no function 'nothing'"),
        ("unknown_zoo_model", "good", "the zoo has no model"),
        ("good_module:make_text", "nan", "not finite"),
        ("good_module:make_text", "short", "one whole number for each"),
        ("good_module:make_text", "pickled", "x holds object, not numbers"),
    ],
)
def test_model_build_of_what_cannot_be_built_says_why(
    shoal: Run, tmp_path: Path, source: str, data: str, said: str
) -> None:
    (tmp_path / "models.py").write_text("def make_model():\n    return None\n")
    (tmp_path / "broken_module.py").write_text("def make(:\n")
    (tmp_path / "good_module.py").write_text("def make_text():\n    return 'text'\n")
    x, y = np.ones((6, 4), np.float32), np.arange(6) % 2
    arrays = {
        "good": {"x": x, "y": y},
        "nan": {"x": x * np.nan, "y": y},
        "short": {"x": x, "y": y[:3]},
        "pickled": {"x": np.array([{}] * 6, object), "y": y},
    }
    file = tmp_path / f"{data}.npz"
    if data in arrays:
        np.savez(file, **arrays[data])
    printed = shoal(
        "model", "build", source, "--data", str(file), "--path", str(tmp_path), "--out", str(tmp_path / "b")
    )
    assert printed.code in (2, 6)
    assert said in printed.err
    assert not (tmp_path / "b").exists()


def test_model_import_without_a_bundle_is_refused(made: Run, tmp_path: Path) -> None:
    printed = made("model", "import", str(tmp_path / "nothing"))
    assert printed.code == 6
    assert "hint:" in printed.err


def test_release_is_promoted_and_rolled_back(made: Run, tmp_path: Path) -> None:
    import_unchecked(tmp_path)
    with Deployment.open(state_folder(tmp_path)) as deployment:
        row = deployment.publisher.propose(
            make_candidate(2), run="r", round_number=1, metrics={"accuracy": 0.5}
        )
        deployment.publisher.hold(row.version, "no_gain")
    listed = made("release", "list", "--json").json
    assert [(row["version"], row["state"], row["rings"]) for row in listed] == [
        (1, "released", ["stable"]),
        (2, "held", []),
    ]
    assert made("release", "promote", "2", "--json").json == {"ring": "stable", "release_version": 2}
    assert made("release", "promote", "1").code == 2
    assert made("release", "rollback", "--reason", "errors", "--json").json["release_version"] == 1
    shown = made("release", "show", "2", "--json").json
    assert (shown["state"], shown["reason"]) == ("rolled_back", "errors")
    assert shown["history"] == ["set stable 1 -> 2", "rolled back stable 2 -> 1"]
    assert "rolled_back" in made("release", "list").out


def test_rounds_are_listed_and_shown(made: Run, tmp_path: Path) -> None:
    graphs = import_unchecked(tmp_path)
    enrol(tmp_path, "watch-1", made("device", "add", "watch-1").out)
    with (
        Deployment.open(state_folder(tmp_path)) as deployment,
        deployment.database.transaction() as connection,
    ):
        for statement in (
            "INSERT INTO runs VALUES ('spring', 1.0, :g, '{}', 42, 'active')",
            """INSERT INTO rounds VALUES ('spring', 1, 'done', :g, :g, 9.0, '{}', 7, '[5]', 2.0, 4.5,
               '{"accuracy": 0.75}', '')""",
            """INSERT INTO orders VALUES ('aa', 'spring', 1, 'watch-1', 'train', 'answered', '', :g, '{}',
            9.0,
               2.0, 3.0)""",
            """INSERT INTO updates VALUES ('bb', 'aa', 'spring', 1, 'watch-1', 'train', 12, 'int4', '{}',
            NULL,
               NULL, :g, :g, 999, 'folded', '', 3.0, 0.0)""",
        ):
            connection.exec_driver_sql(statement, {"g": graphs})
    rounds = made("round", "list", "--json").json
    assert [(row["run"], row["round"], row["cohort"], row["seconds"]) for row in rounds] == [
        ("spring", 1, 1, 2.5)
    ]
    shown = made("round", "show", "1", "--json").json
    assert [(row["device"], row["state"], row["size_bytes"]) for row in shown["updates"]] == [
        ("watch-1", "folded", 999)
    ]
    assert "seed" not in json.dumps(shown)
    people = made("round", "show", "1").out
    assert "accuracy=0.75" in people
    assert "folded" in people


def test_record_of_an_app_is_forgotten_by_a_word_and_not_beside_a_running_service(
    made: Run, tmp_path: Path
) -> None:
    refused = made("round", "anew", "--run", "spring")
    assert (refused.code, "no record of an app" in refused.err) == (2, True)
    with Deployment.open(state_folder(tmp_path)) as deployment:
        with deployment.database.transaction() as connection:
            insert_step(connection, "spring", GridStep(position=1, kind="nodes", answer={"nodes": [4]}), 1.0)
        with deployment.folder.lock("service"):
            refused = made("round", "anew", "--run", "spring")
            assert (refused.code, "stop it first" in refused.err) == (2, True)
        fence = deployment.database.claim_writer()
        assert made("round", "anew", "--run", "spring").code == 0
        with deployment.database.read() as connection:
            assert [step.kind for step in load_steps(connection, "spring")] == [BEGIN]
        # A service elsewhere writes nothing more.
        assert deployment.database.current_fence() > fence


def test_settings_with_an_unknown_key_name_the_nearest(made: Run, tmp_path: Path) -> None:
    file = state_folder(tmp_path) / "settings.toml"
    file.write_text(file.read_text().replace("quorum", "quorom"))
    printed = made("status")
    assert printed.code == 2
    assert "quorom" in printed.err
    assert "quorum" in printed.err


def test_state_folder_of_another_version_is_refused(made: Run, tmp_path: Path) -> None:
    (state_folder(tmp_path) / "FORMAT").write_text("shoal-cloud 99\n")
    printed = made("device", "list")
    assert printed.code == 2
    assert "shoal-cloud 99" in printed.err


def test_second_service_on_one_folder_is_refused(made: Run, tmp_path: Path) -> None:
    with StateFolder(state_folder(tmp_path)).lock("service").at_once("held"):
        assert made("status", "--json").json["is_running"]
        printed = made("run")
    assert printed.code == 2
    assert "already" in printed.err


def test_names_from_a_peer_cannot_write_to_the_terminal(made: Run, tmp_path: Path) -> None:
    enrol(tmp_path, "watch-1", made("device", "add", "watch-1").out)
    made("device", "quarantine", "watch-1", "--reason", "\x1b[2Jgone")
    assert "\x1b" not in made("device", "list").out


def test_commands_that_list_load_no_framework(made: Run, tmp_path: Path) -> None:
    program = (
        "import sys; from cloud_server.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'flwr', 'onnx', 'onnxruntime', 'fastapi', 'alembic'} & set(sys.modules)));"
        "sys.exit(code)"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "device",
        "list",
        "--state",
        str(state_folder(tmp_path)),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
