"""Sealing and opening an update against SHA-256 and memcpy over the same bytes."""

from __future__ import annotations

import hashlib

import numpy as np

from bench.table import Row, interleaved_medians
from wire.envelope import Expect, Signer, open_sealed, seal
from wire.header import Header
from wire.primitives import KemPrivateKey, SigningKey

_SIZE = 1_000_000


def measure() -> list[Row]:
    """Rows for both key agreements at 1 MB."""
    body = np.random.default_rng(0).bytes(_SIZE)
    return [row for algorithm in ("x25519", "mlkem768-x25519") for row in _rows(algorithm, body)]


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
            limit_bytes=2 * _SIZE,
        )

    goal = ">= 0.6" if algorithm == "x25519" else ">= 0.5"
    rows = []
    for name, call in (("seal", close), ("open", opened)):
        ours, digest = interleaved_medians(call, lambda: hashlib.sha256(body).digest())
        _, copy = interleaved_medians(call, lambda: bytearray(body))
        note = f"1 MB: {_SIZE / ours / 1e6:.0f} MB/s; {ours / copy:.0f} times memcpy's time"
        rows.append(Row(f"{name}, {algorithm}: speed / SHA-256", digest / ours, goal, note=note))
    size = len(message) - len(body)
    rows.append(Row(f"envelope overhead, {algorithm}", float(size), unit="B", note="1 MB body, 11 records"))
    return rows
