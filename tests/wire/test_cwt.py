"""Our messages opened by the `cwt` package, and its messages by us. It pins another cbor2 than ours, so it lives in an
environment of its own, build/oracles/cwt, which is made at the first run."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.wire.parties import DEVICE_KEY, KEM, OTHER_KEY, open_up, up_header
from wire.envelope import seal
from wire.errors import EnvelopeError
from wire.header import header_bytes
from wire.primitives import KemPrivateKey

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "oracles" / "cwt"
PIN = "cwt==3.3.0"
SIDE = ROOT / "tests" / "wire" / "oracles" / "cwt_side.py"

Ask = Callable[..., dict[str, bytes]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cwt_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter that has `cwt`; the tests are skipped where it can neither be found nor installed."""
    ready = FOLDER / f"{PIN}.ready"
    python = FOLDER / "bin" / "python"
    if ready.exists():
        return python
    # Built beside and renamed, because two workers may come here at once; pip's own scripts are not used after.
    own = FOLDER.with_name(f"cwt.{os.getpid()}")
    venv.create(own, with_pip=True, clear=True)
    command = [own / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PIN]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"{PIN} cannot be installed here: {done.stderr.strip()[-200:]}")
    (own / ready.name).touch()
    if not FOLDER.exists():
        own.rename(FOLDER)
        return python
    return own / "bin" / "python"


@pytest.fixture
def ask(cwt_python: Path) -> Ask:
    """Puts a request to the other side; bytes go and come as bytes."""

    def asked(do: str, **values: bytes) -> dict[str, bytes]:
        request = {"do": do, **{name: value.hex() for name, value in values.items()}}
        done = subprocess.run(
            [cwt_python, SIDE],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, str] = json.loads(done.stdout)
        return {name: bytes.fromhex(value) for name, value in answer.items()}

    return asked


def keys(kem: KemPrivateKey = KEM, **more: bytes) -> dict[str, bytes]:
    public = {
        "signer_id": DEVICE_KEY.key_id,
        "signer_public": DEVICE_KEY.public_bytes,
        "kem_id": kem.key_id,
        "kem_public": kem.public_key.public_bytes,
    }
    return public | more


@pytest.mark.parametrize("content_algorithm", ["A256GCM", "C20P"])
@pytest.mark.parametrize("size", [0, 1, 5000])
def test_cwt_opens_what_we_sealed(ask: Ask, content_algorithm: str, size: int) -> None:
    body = os.urandom(size)
    changes: dict[str, Any] = {"record_bytes": 1024, "content_algorithm": content_algorithm}
    message = seal(up_header(), body, signer=DEVICE_KEY, recipient=KEM.public_key, **changes)
    answer = ask("open", message=message, kem_private=KEM.private_bytes(), **keys())
    assert answer == {"plaintext": body, "header": header_bytes(up_header())}


@pytest.mark.parametrize("body", [b"", b"from the other side", bytes(70_000)], ids=len)
def test_we_open_what_cwt_sealed(ask: Ask, body: bytes) -> None:
    private = {"signer_private": DEVICE_KEY.private_bytes()}
    answer = ask("seal", header=header_bytes(up_header()), body=body, **keys(**private))
    opened = open_up(answer["message"])
    assert (opened.body, opened.header, opened.key_id) == (body, up_header(), DEVICE_KEY.key_id)


def test_we_refuse_what_cwt_sealed_with_another_devices_key(ask: Ask) -> None:
    other = {
        "signer_private": OTHER_KEY.private_bytes(),
        "signer_id": OTHER_KEY.key_id,
        "signer_public": OTHER_KEY.public_bytes,
    }
    answer = ask("seal", header=header_bytes(up_header()), body=b"stolen", **keys() | other)
    with pytest.raises(EnvelopeError) as caught:
        open_up(answer["message"])
    assert caught.value.reason == "sender"
