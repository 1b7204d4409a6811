"""`shoal-cloud` on folders, files and words that cannot be used: one error, one hint, its code, nothing half-made."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_server.cli import main
from cloud_server.cli.model_command import _take_in
from cloud_server.deployment import Deployment, initialise
from cloud_server.run_setup import prepare_run
from cloud_server.settings import BrokerSettings, CloudSettings
from tests.cloud.small_bundle import write_bundle
from wire.errors import ConfigurationError, ReleaseError, StorageError

Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder that every test copies."""
    folder = tmp_path_factory.mktemp("cloud") / "state"
    initialise(folder, CloudSettings()).close()
    return folder


@pytest.fixture
def state(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "state"))


def tokens(state: Path) -> int:
    with Deployment.open(state) as deployment, deployment.database.read() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM tokens").scalar_one())


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a command that must fail; its code and what it said."""
    capsys.readouterr()
    code = main(words)
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.splitlines()
    assert [line.partition(": ")[0] for line in said] == ["error", "hint"]
    return code, captured.err


def execute(file: Path, *statements: str) -> None:
    connection = sqlite3.connect(file)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def foreign(state: Path) -> None:
    (state / "cloud.db").unlink()
    execute(state / "cloud.db", "CREATE TABLE pets (name TEXT)")


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pipe_for(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (lambda state: (state / "cloud.db").write_text("hello " * 1000), 8, "file is not a database"),
        (lambda state: (state / "cloud.db").unlink(), 8, "cloud.db is missing"),
        (lambda state: (state / "cloud.db").write_bytes(b""), 8, "cloud.db is missing or empty"),
        (lambda state: half(state / "cloud.db"), 8, "restore it from its backup"),
        (foreign, 8, "holds 'pets' and no tables of Shoal's"),
        (
            lambda state: execute(state / "cloud.db", "UPDATE alembic_version SET version_num = '9999'"),
            8,
            "newer version of Shoal",
        ),
        (lambda state: execute(state / "cloud.db", "DROP TABLE tokens"), 8, "no such table: tokens"),
        (lambda state: (state / "settings.toml").unlink(), 2, "No such file"),
        (lambda state: (state / "settings.toml").write_bytes(b"\xff\xfe"), 2, "it is not UTF-8 text"),
        (
            lambda state: (state / "settings.toml").write_text("[gate]\nmin_gain = nan"),
            2,
            "gate.min_gain: nan",
        ),
        (lambda state: (state / "settings.toml").write_text("run = 3"), 2, "run: expected a table, got int"),
        (
            lambda state: (state / "settings.toml").write_text("[compute]\ndevice = 'tpu'"),
            2,
            "compute.device",
        ),
        (lambda state: (state / "FORMAT").write_bytes(b"\xff"), 2, "not a state folder"),
        (lambda state: shutil.rmtree(state / "keys"), 8, "restore keys/"),
        (lambda state: pipe_for(state / "keys/online/order.key"), 2, "not a plain file"),
        (lambda state: (state / "keys/online/order.key").write_bytes(b"\xff"), 2, "not a key file"),
        (lambda state: (state / "keys/online/order.key").chmod(0o644), 2, "chmod 600"),
        (lambda state: shutil.rmtree(state / "ca"), 8, "ca.key"),
    ],
)
def test_damaged_state_folder_lets_nobody_in(
    state: Path, capsys: pytest.CaptureFixture[str], damage: Break, code: int, said: str
) -> None:
    damage(state)
    found, err = refused(["device", "add", "watch-1", "--state", str(state)], capsys)
    assert (found, said in err) == (code, True), err
    assert "sqlalche" not in err.lower()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["device", "add", ""], "is a variable unset?"),
        (["device", "add", "--hours", "nan"], "'nan' is not from 0 up to 8784 hours"),
        (["device", "add", "--count", "1e3"], "'1e3' is not a whole number"),
        (["device", "add", "--url", "https://x:99999"], "https://host:port"),
        (["device", "list", "--jsno"], "did you mean --json?"),
        (["round", "list", "--last", "-3"], "'-3' is not from 1 up"),
        (["round", "show", "9" * 12], "is not from 1 to 2147483647"),
        (["release", "show", "9" * 40], "is not from 1 up"),
        (["release", "promote", "1", "--ring", ""], "ring"),
        (["model", "import", ""], "the path is empty"),
        (["status", "--state", ""], "the path is empty"),
        (["status", "--state", "/dev/null"], "not a state folder"),
    ],
)
def test_word_that_cannot_be_is_named(
    state: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    found, err = refused(words if "--state" in words else [*words, "--state", str(state)], capsys)
    assert (found, said in err) == (2, True), err
    assert tokens(state) == 0


@pytest.mark.parametrize("place", ["nowhere/token", "folder"])
def test_token_that_cannot_be_handed_over_is_not_let_in(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "folder").mkdir()
    words = ["device", "add", "watch-1", "--state", str(state), "--output", str(tmp_path / place)]
    assert refused(words, capsys)[0] == 8
    assert tokens(state) == 0
    assert list((tmp_path / "folder").iterdir()) == []


def test_token_that_nobody_read_is_not_let_in(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", closefd=False) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["device", "add", "watch-1", "--state", str(state)]) == 141
    os.close(writer)
    monkeypatch.undo()
    assert tokens(state) == 0


@pytest.mark.parametrize(
    ("settings", "serverapp", "said"),
    [
        ("", "no_such_module:app", "no_such_module"),
        ("", "app", "app"),
        ("[run]\nstrategy = 'FedNope'", "", "FedNope"),
        ("[run]\nstrategy = 'FedAvgM'\nparameters = { momentum = 3 }", "", "momentum"),
        ("[run]\nmodel = 'never-imported'", "", "never-imported"),
        ("[run]\nstrategy = 'FLTrust'\n[refine]\ndata = 'clean.npz'", "", "clean.npz is not there"),
    ],
)
def test_run_that_cannot_be_is_refused_before_there_is_a_model(
    state: Path, settings: str, serverapp: str, said: str
) -> None:
    (state / "settings.toml").write_text(settings)
    with (
        Deployment.open(state) as deployment,
        pytest.raises(ConfigurationError) as caught,
    ):
        prepare_run(deployment, serverapp)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--broker", "embedded", "--broker-tls"],
        ["--broker-host", "0.0.0.0"],
        ["--settings", "/nowhere/settings.toml"],
        ["--settings", "/dev/zero"],
    ],
)
def test_init_of_what_could_never_run_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert refused(["init", "--state", str(tmp_path / "new"), *words], capsys)[0] == 2
    assert not (tmp_path / "new").exists()


def test_init_with_tls_to_the_broker_needs_no_editing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["init", "--state", str(tmp_path / "new"), "--broker", "mosquitto", "--broker-tls"]) == 0
    with Deployment.open(tmp_path / "new") as deployment:
        assert deployment.settings.broker == BrokerSettings(kind="mosquitto", tls=True)


def test_init_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/nowhere/cloud.db"
    settings = CloudSettings(storage=CloudSettings().storage.__class__(database=database))
    with pytest.raises(StorageError):
        initialise(tmp_path / "new", settings)
    assert not (tmp_path / "new").exists()


def test_import_without_the_offline_key_leaves_nothing(state: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (state / "keys/offline/targets.key").unlink()
    with Deployment.open(state) as deployment:
        with pytest.raises(ConfigurationError):
            _take_in(deployment, bundle, "stable")
        assert list(deployment.folder.bundles.iterdir()) == []
        assert not deployment.publisher.is_imported(bundle.manifest.graphs_sha256)


def test_import_whose_release_fails_is_withdrawn_and_can_be_made_again(state: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    graphs = bundle.manifest.graphs_sha256
    with Deployment.open(state) as deployment:
        blocker = deployment.folder.artefacts / "releases"
        blocker.write_text("a file where a folder has to be")
        with pytest.raises((StorageError, ReleaseError)):
            _take_in(deployment, bundle, "stable")
        assert not deployment.publisher.is_imported(graphs)
        assert list(deployment.folder.bundles.iterdir()) == []
        blocker.unlink()
        assert _take_in(deployment, bundle, "stable") == 1
        assert deployment.publisher.current_version() == 1
