"""Settings and the state folder of an aggregator."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cloud_server.layout import FileLock, StateFolder, is_locked
from cloud_server.settings import CloudSettings, load_cloud_settings
from process.options import options, render_toml
from wire.errors import ConfigurationError, StorageError
from wire.messages import TrainConfig


def test_rendered_settings_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(render_toml(CloudSettings()))
    assert load_cloud_settings(file, {}) == CloudSettings()


def test_variable_stands_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[run]\nquorum = 3\n")
    environment = {"SHOAL_CLOUD_RUN_QUORUM": "5", "SHOAL_STATE": "/x", "HOME": "/root"}
    assert load_cloud_settings(file, environment).run.quorum == 5


@pytest.mark.parametrize(
    "text",
    [
        "quorum = 3",
        "[run]\nquorum = 0",
        "[run]\nquorum = 'x'",
        "[train]\ncodec = 'zip'",
        "tenant = 'a/b'",
        "= 1",
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=r"settings\.toml"):
        load_cloud_settings(file, {})


def test_every_option_says_what_it_is() -> None:
    undescribed = [option.key for option in options(CloudSettings) if not option.description]
    assert undescribed == []


def test_training_defaults_are_the_protocols() -> None:
    assert CloudSettings().train.config() == TrainConfig()


def test_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        StateFolder(tmp_path).check()
    assert "shoal-cloud init" in caught.value.hint


def test_folder_with_something_in_it_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConfigurationError, match="not empty"):
        StateFolder(tmp_path).create()
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_folder_under_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        StateFolder(tmp_path / "file" / "state").create()


def test_folder_counts_only_once_it_is_sealed(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    folder.create()
    with pytest.raises(ConfigurationError):
        folder.check()
    folder.seal()
    folder.check()


def test_lock_excludes_threads_and_is_given_back(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    counted = 0

    def count() -> None:
        nonlocal counted
        for _ in range(50):
            with lock:
                value = counted
                counted = value + 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == 200
    assert not is_locked(lock)
    with FileLock(tmp_path / "lock"):
        assert is_locked(lock)
