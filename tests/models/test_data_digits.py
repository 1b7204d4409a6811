"""The digits: what is in the file, how it is divided, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from models.data import digits, make_digits
from wire.errors import ConfigurationError, DataError


def test_file_has_the_hash_that_is_checked() -> None:
    assert hashlib.sha256(digits.FILE.read_bytes()).hexdigest() == digits.FILE_SHA256


def test_digits_are_those_of_the_documentation() -> None:
    x, y = digits.load_digits()
    assert x.shape == (1797, 64)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    # "Class: no of examples in testing set", as the repository counts them.
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_federation_gives_every_digit_to_one_part() -> None:
    federation = digits.federation(devices=12, seed=3)
    own = federation.operator
    parts = [own.train_x, own.val_x]
    for split in federation.devices.values():
        parts += [split.train_x, split.val_x, split.test_x]
    assert sum(map(len, parts)) == 1797
    rows = {row.tobytes() for row in digits.load_digits()[0]}
    assert {row.tobytes() for part in parts for row in part} == rows


def test_reported_digits_come_after_all_others() -> None:
    x, _ = digits.load_digits()
    federation = digits.federation(devices=12, seed=3)
    later = {row.tobytes() for row in x[1797 * 70 // 100 :]}
    for split in federation.devices.values():
        assert {row.tobytes() for row in split.test_x} <= later
        assert not {row.tobytes() for row in np.concatenate([split.train_x, split.val_x])} & later


def test_federation_depends_on_its_seed_alone() -> None:
    assert digits.federation(seed=1).split_hash() == digits.federation(seed=1).split_hash()
    assert digits.federation(seed=1).split_hash() != digits.federation(seed=2).split_hash()


def test_too_many_devices_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="500 devices"):
        digits.federation(devices=500)


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "digits.npz"
    damaged.write_bytes(digits.FILE.read_bytes() + b"\0")
    monkeypatch.setattr(digits, "FILE", damaged)
    with pytest.raises(DataError, match="is not the digits"):
        digits.load_digits()
    monkeypatch.setattr(digits, "FILE", tmp_path / "absent.npz")
    with pytest.raises(DataError, match="cannot read"):
        digits.load_digits()


@pytest.mark.parametrize(("member", "words"), [(make_digits.MEMBER, "SHA-256"), ("another", "does not hold")])
def test_another_wheel_is_refused_before_anything_is_written(
    member: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "scikit_learn.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, gzip.compress(b"1,2\n"))
    target = tmp_path / "out.npz"
    assert make_digits.main([str(wheel), "--out", str(target)]) == 6
    assert words in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("text", [b"1,2\n", b"words", b"17," * 64 + b"1\n"], ids=["short", "words", "pixel"])
def test_file_that_holds_no_digits_is_not_converted(text: bytes) -> None:
    with pytest.raises(DataError):
        make_digits.convert(gzip.compress(text))
