"""Sealing and opening an update against SHA-256 and memcpy over the same bytes.

One megabyte shows what signature, key agreement and CBOR cost besides the bytes; ten show the bytes alone.
"""

from __future__ import annotations

import hashlib

import numpy as np

from bench.table import Row, interleaved_medians
from wire.envelope import Expect, Signer, open_sealed, seal
from wire.header import Header
from wire.primitives import KemPrivateKey, SigningKey

_SIZES = (1_000_000, 10_000_000)
_REPEATS = {1_000_000: 101, 10_000_000: 25}


def measure() -> list[Row]:
    """Rows for both key agreements and sizes."""
    random = np.random.default_rng(0)
    bodies = [random.bytes(size) for size in _SIZES]
    return [
        row
        for algorithm in ("x25519", "mlkem768-x25519")
        for body in bodies
        for row in _rows(algorithm, body)
    ]


def _rows(algorithm: str, body: bytes) -> list[Row]:
    signer, kem = SigningKey.generate(), KemPrivateKey.generate(algorithm)
    header = Header(type="up", direction="up", tenant="t", fleet="f", device="d", epoch=1, seq=1)
    signers = {signer.key_id: Signer("d", signer.verify_key)}
    expect = Expect("up", "t", "f", "up", "d")

    def close() -> bytes:
        return seal(header, body, signer=signer, recipient=kem.public_key)

    message = close()

    def opened() -> object:
        return open_sealed(
            message,
            signers=signers,
            recipients={kem.key_id: kem},
            expect=expect,
            now=0.0,
            limit_bytes=2 * len(body),
        )

    size, repeats = len(body), _REPEATS[len(body)]
    goal = ">= 0.6" if algorithm == "x25519" else ">= 0.5"
    title = f"{algorithm}, {size // 1_000_000} MB"
    rows = []
    for name, call in (("seal", close), ("open", opened)):
        ours, digest = interleaved_medians(call, lambda: hashlib.sha256(body).digest(), repeats=repeats)
        _, copy = interleaved_medians(call, lambda: bytearray(body), repeats=repeats)
        note = f"{size / ours / 1e6:.0f} MB/s; {ours / copy:.0f} times memcpy's time; median of {repeats}"
        rows.append(Row(f"{name}, {title}: speed / SHA-256", digest / ours, goal, note=note))
    overhead = float(len(message) - size)
    rows.append(
        Row(f"envelope overhead, {title}", overhead, unit="B", note="48 B of it for each record of 98,304 B")
    )
    return rows
