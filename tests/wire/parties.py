"""Fixed keys and a short way to seal, sign and open between them: a device, another device, the cloud."""

from __future__ import annotations

from typing import Any

from wire.envelope import Expect, Opened, Signer, open_sealed, open_signed
from wire.header import Header
from wire.primitives import KemPrivateKey, SigningKey

DEVICE_KEY = SigningKey.from_bytes(b"device".ljust(32, b"\0"))
OTHER_KEY = SigningKey.from_bytes(b"other device".ljust(32, b"\0"))
CLOUD_KEY = SigningKey.from_bytes(b"cloud orders".ljust(32, b"\0"))
STRANGER_KEY = SigningKey.from_bytes(b"stranger".ljust(32, b"\0"))
KEMS = {
    "x25519": KemPrivateKey.from_bytes("x25519", b"cloud kem".ljust(32, b"\0")),
    "mlkem768-x25519": KemPrivateKey.from_bytes("mlkem768-x25519", b"cloud hybrid kem".ljust(32, b"\0")),
}
KEM = KEMS["x25519"]

SIGNERS = {
    DEVICE_KEY.key_id: Signer("watch-1", DEVICE_KEY.verify_key),
    OTHER_KEY.key_id: Signer("watch-2", OTHER_KEY.verify_key),
    CLOUD_KEY.key_id: Signer("", CLOUD_KEY.verify_key),
}
RECIPIENTS = {key.key_id: key for key in KEMS.values()}
LIMIT_BYTES = 2**20
NOW = 1_800_000_000.0

UPWARD = Expect("up", "acme", "wrists", frozenset({"up", "ev"}), "watch-1")
DOWNWARD = Expect("down", "acme", "wrists", frozenset({"ak", "cm", "rd", "md"}), "watch-1")


def up_header(**changes: Any) -> Header:
    """What `watch-1` would put on an update."""
    values: dict[str, Any] = {
        "type": "up",
        "direction": "up",
        "tenant": "acme",
        "fleet": "wrists",
        "device": "watch-1",
        "epoch": 3,
        "seq": 41,
        "run": "spring",
        "round_number": 7,
        "base": bytes(range(32)),
        "expiry": int(NOW) + 600,
    }
    return Header(**(values | changes))


def down_header(**changes: Any) -> Header:
    """What the cloud would put on a receipt for `watch-1`."""
    values: dict[str, Any] = {
        "type": "ak",
        "direction": "down",
        "tenant": "acme",
        "fleet": "wrists",
        "device": "watch-1",
        "epoch": 1,
        "seq": 9,
    }
    return Header(**(values | changes))


def open_up(message: bytes, **changes: Any) -> Opened:
    """Opens as the cloud would."""
    arguments: dict[str, Any] = {
        "signers": SIGNERS,
        "recipients": RECIPIENTS,
        "expect": UPWARD,
        "now": NOW,
        "limit_bytes": LIMIT_BYTES,
    }
    return open_sealed(message, **(arguments | changes))


def open_down(message: bytes, **changes: Any) -> Opened:
    """Opens as `watch-1` would."""
    arguments: dict[str, Any] = {
        "signers": {CLOUD_KEY.key_id: SIGNERS[CLOUD_KEY.key_id]},
        "expect": DOWNWARD,
        "now": NOW,
        "limit_bytes": LIMIT_BYTES,
    }
    return open_signed(message, **(arguments | changes))
