"""Offline keys that never meet a network: a request goes to their machine, and comes back with signatures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cloud_server.cli import main
from cloud_server.deployment import Deployment
from cloud_server.release.signing_request import SigningRequest
from models.bundle import Bundle
from tests.cloud.test_rotation import Shoal
from wire.errors import ReleaseError
from wire.primitives import SigningKey, write_private


@pytest.fixture
def shoal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shoal:
    """An aggregator whose offline keys were carried to another folder, `safe`."""
    made = Shoal(tmp_path, capsys)
    made("init")
    made.check()
    shutil.move(made.state / "keys" / "offline", tmp_path / "safe")
    return made


def signed_there(
    shoal: Shoal, capsys: pytest.CaptureFixture[str], *words: str, keys: Path | None = None
) -> tuple[int, Any, str]:
    """`shoal-cloud sign` on the machine of the keys, which has the request, the keys and nothing else."""
    capsys.readouterr()
    place = keys or shoal.folder / "safe"
    code = main(["sign", *words, "--keys", str(place), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def graphs_of(shoal: Shoal) -> set[str]:
    with Deployment.open(shoal.state) as deployment:
        return {path.split("/")[1] for path in deployment.repository._load().targets["targets"].targets}


def test_model_is_imported_by_a_signature_that_was_carried_over(
    shoal: Shoal, real_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, request, back = (
        str(real_bundle.folder),
        shoal.folder / "request.json",
        shoal.folder / "back.json",
    )
    assert "is not here" in shoal("model", "import", bundle)
    assert shoal("model", "import", bundle, "--request", str(request), "--json")["role"] == "targets"
    assert graphs_of(shoal) == set()
    code, told, said = signed_there(shoal, capsys, str(request), "--bundle", bundle, "--out", str(back))
    assert (code, len(told["signed_by"]), told["threshold"]) == (0, 1, 1)
    assert f"+ graphs/{real_bundle.manifest.graphs_sha256}/template.onnx sha256" in said
    assert "6 graph files are those of" in said or "5 graph files are those of" in said
    assert shoal("model", "import", bundle, "--signed", str(back), "--json")["release_version"] == 1
    assert graphs_of(shoal) == {real_bundle.manifest.graphs_sha256}
    assert shoal.check().release_version == 1


def test_root_is_signed_again_by_shares_on_two_machines(
    shoal: Shoal, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = shoal.folder / "first", shoal.folder / "second"
    for number, place in ((1, first), (3, second)):
        place.mkdir()
        shutil.copy(shoal.folder / "safe" / f"root-{number}.key", place)
    request, half, whole = (shoal.folder / f"{name}.json" for name in ("request", "half", "whole"))
    shoal("keys", "sign", "root", "--request", str(request))
    code, told, said = signed_there(shoal, capsys, str(request), "--out", str(half), keys=first)
    assert (code, len(told["signed_by"]), told["threshold"]) == (0, 1, 2)
    assert "1 more signatures are needed" in said
    assert "has not the 2 signatures" in shoal("keys", "sign", "root", "--signed", str(half))
    code, told, _ = signed_there(shoal, capsys, str(half), "--out", str(whole), keys=second)
    assert (code, len(told["signed_by"])) == (0, 2)
    before = {row["role"]: row["expires"] for row in shoal("keys", "expiry", "--json")}
    shoal("keys", "sign", "root", "--signed", str(whole), "--json")
    assert {row["role"]: row["expires"] for row in shoal("keys", "expiry", "--json")}["root"] >= before[
        "root"
    ]
    assert shoal.check().keys.kem


def test_request_is_for_one_state_only(
    shoal: Shoal, real_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was signed before something else was published is not published over it."""
    stale, request, old, new = (shoal.folder / f"{name}.json" for name in ("stale", "request", "old", "new"))
    shoal("keys", "sign", "targets", "--request", str(stale))
    shoal("model", "import", str(real_bundle.folder), "--request", str(request))
    for one, signed in ((stale, old), (request, new)):
        assert signed_there(shoal, capsys, str(one), "--out", str(signed))[0] == 0
    assert "release_version" in shoal(
        "model", "import", str(real_bundle.folder), "--signed", str(new), "--json"
    )
    assert "not for what is here now" in shoal("keys", "sign", "targets", "--signed", str(old))
    assert "the request is for targets" in shoal("keys", "sign", "root", "--signed", str(old))
    assert shoal.check().release_version == 1


def test_signature_of_a_key_that_does_not_count_is_not_made(
    shoal: Shoal, capsys: pytest.CaptureFixture[str]
) -> None:
    request, place = shoal.folder / "request.json", shoal.folder / "others"
    shoal("keys", "sign", "targets", "--request", str(request))
    place.mkdir()
    write_private(place / "targets.key", f"ed25519 {SigningKey.generate().private_bytes().hex()}\n".encode())
    code, _, said = signed_there(shoal, capsys, str(request), "--out", str(shoal.folder / "out"), keys=place)
    assert code == 2
    assert "no key here counts for targets" in said
    assert not (shoal.folder / "out").exists()


def test_bundle_that_is_not_the_requests_is_not_signed(
    shoal: Shoal, real_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has the aggregator may ask for other graphs than those that were looked at."""
    request, other = shoal.folder / "request.json", shoal.folder / "bundle"
    shoal("model", "import", str(real_bundle.folder), "--request", str(request))
    shutil.copytree(real_bundle.folder, other)
    (other / "train_sgd.onnx").write_bytes((other / "train_sgd.onnx").read_bytes() + b"\0")
    words = (str(request), "--bundle", str(other), "--out", str(shoal.folder / "out"))
    code, _, said = signed_there(shoal, capsys, *words)
    assert code == 5
    assert "is not what the bundle has" in said
    assert not (shoal.folder / "out").exists()


@pytest.mark.parametrize("change", ["format", "role", "cut", "expires", "keys"])
def test_request_that_is_damaged_is_refused(shoal: Shoal, change: str) -> None:
    request = shoal.folder / "request.json"
    shoal("keys", "sign", "targets", "--request", str(request))
    data = request.read_bytes()
    plain = json.loads(data)
    if change == "cut":
        broken = data[: len(data) // 2]
    else:
        at = plain["metadata"]["signed"] if change == "expires" else plain
        at[{"keys": "key_ids"}.get(change, change)] = {"role": "timestamp", "keys": 3}.get(change, "x")
        broken = json.dumps(plain).encode()
    with pytest.raises(ReleaseError):
        SigningRequest.from_bytes(broken)


def test_request_that_was_changed_on_its_way_says_so_or_is_not_published(
    shoal: Shoal, capsys: pytest.CaptureFixture[str]
) -> None:
    request, back = shoal.folder / "request.json", shoal.folder / "back.json"
    shoal("keys", "sign", "targets", "--request", str(request))
    plain = json.loads(request.read_bytes())
    plain["metadata"]["signed"]["targets"]["graphs/aa/x.onnx"] = {
        "length": 1,
        "hashes": {"sha256": "00" * 32},
    }
    request.write_text(json.dumps(plain))
    code, _, said = signed_there(shoal, capsys, str(request), "--out", str(back))
    assert code == 0
    assert "+ graphs/aa/x.onnx sha256 0000" in said
    assert "not for what is here now" in shoal("keys", "sign", "targets", "--signed", str(back))
