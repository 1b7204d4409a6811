"""The smartwatch data: what is in the file, and that the three parts of a recording share nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from models.data import make_smartwatch, smartwatch
from wire.errors import DataError


def test_recordings_are_one_for_each_person_wrist_and_exercise() -> None:
    recordings = smartwatch.load_recordings()
    keys = [(r.person, smartwatch.WRISTS.index(r.wrist), r.label) for r in recordings]
    assert keys == [(p, w, y) for p in range(1, 11) for w in range(2) for y in range(7)]
    assert sum(len(r.samples) for r in recordings) == 244_102
    assert all(r.samples.dtype == np.float32 and r.samples.shape[1] == 6 for r in recordings)
    # The largest values of two channels of the source, to the step of the file.
    largest = np.abs(np.concatenate([r.samples for r in recordings])).max(axis=0)
    np.testing.assert_allclose(largest[[1, 3]], [5.396133, 28.959517], rtol=1e-4)


def test_parts_of_a_recording_share_no_sample() -> None:
    marked = [
        smartwatch.Recording(1, "left", 0, np.repeat(np.arange(t, dtype=np.float32)[:, None], 6, axis=1))
        for t in (947, 2618)
    ]
    for recording in marked:
        split = smartwatch.split_recordings([recording])
        parts = []
        for windows in (split.train_x, split.val_x, split.test_x):
            assert len(windows) > 0
            values = windows * np.array(smartwatch.DEVIATION, np.float32)[:, None]
            values = values + np.array(smartwatch.MEAN, np.float32)[:, None]
            parts.append(set(np.rint(values).astype(int).ravel().tolist()))
        train, validation, test = parts
        assert max(train) < min(validation)
        assert max(validation) < min(test)


def test_test_windows_do_not_overlap() -> None:
    samples = np.arange(600, dtype=np.float32).repeat(6).reshape(600, 6)
    windows = smartwatch.cut_windows(samples, smartwatch.TEST_STRIDE)
    starts = windows[:, 0, 0]
    assert len(windows) == 6
    assert np.all(np.diff(starts) * smartwatch.DEVIATION[0] >= smartwatch.WINDOW - 0.5)


def test_constants_come_from_the_training_parts_of_the_operators_people() -> None:
    parts = [
        r.samples[: smartwatch.borders(len(r.samples))[0]].astype(np.float64)
        for r in smartwatch.load_recordings()
        if r.person in smartwatch.OPERATOR_PEOPLE
    ]
    samples = np.concatenate(parts)
    np.testing.assert_allclose(samples.mean(axis=0), smartwatch.MEAN, atol=5e-5)
    np.testing.assert_allclose(samples.std(axis=0), smartwatch.DEVIATION, atol=5e-5)


def test_federation_leaves_the_operators_people_out() -> None:
    federation = smartwatch.federation()
    assert len(federation.devices) == 16
    assert not any(name.startswith(("person-01", "person-02")) for name in federation.devices)
    for split in (federation.operator, *federation.devices.values()):
        for x, y in (
            (split.train_x, split.train_y),
            (split.val_x, split.val_y),
            (split.test_x, split.test_y),
        ):
            assert x.dtype == np.float32
            assert x.shape == (len(y), 6, 100)
            assert set(y.tolist()) == set(range(7))


def test_split_hash_is_that_of_the_documented_split() -> None:
    federation = smartwatch.federation()
    assert federation.split_hash() == smartwatch.federation().split_hash()
    other = smartwatch.Split(**{**vars(federation.operator), "test_y": federation.operator.test_y + 1})
    assert other.digest() != federation.operator.digest()


def test_unknown_device_is_an_error_that_names_the_people() -> None:
    with pytest.raises(DataError) as caught:
        smartwatch.device_windows(11, "left")
    assert "1 to 10" in caught.value.hint


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "smartwatch.npz"
    damaged.write_bytes(smartwatch.FILE.read_bytes() + b"\0")
    monkeypatch.setattr(smartwatch, "FILE", damaged)
    smartwatch.load_recordings.cache_clear()
    with pytest.raises(DataError, match="is not the smartwatch data"):
        smartwatch.load_recordings()
    monkeypatch.setattr(smartwatch, "FILE", tmp_path / "absent.npz")
    with pytest.raises(DataError, match="cannot read"):
        smartwatch.load_recordings()
    smartwatch.load_recordings.cache_clear()


def test_file_has_the_hash_that_is_checked() -> None:
    assert hashlib.sha256(smartwatch.FILE.read_bytes()).hexdigest() == smartwatch.FILE_SHA256


def test_another_wheel_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "seglearn-1.2.5-py3-none-any.whl"
    wheel.write_bytes(b"PK\x03\x04")
    target = tmp_path / "out.npz"
    assert make_smartwatch.main([str(wheel), "--out", str(target)]) == 6
    assert "SHA-256" in capsys.readouterr().err
    assert not target.exists()
