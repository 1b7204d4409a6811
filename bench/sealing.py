"""Sealing and opening an update against SHA-256 and memcpy over the same bytes.

One megabyte shows what signature, key agreement and CBOR cost besides the bytes; ten show the bytes alone; what no
bytes take, which a row tells too, says where in between the goal is reached.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np

from bench.table import Row, interleaved_medians
from wire.envelope import Expect, Signer, open_sealed, seal
from wire.header import Header
from wire.primitives import KemPrivateKey, SigningKey

_SIZES = (1_000_000, 3_000_000, 10_000_000)
_REPEATS = {1_000_000: 101, 3_000_000: 51, 10_000_000: 25}
_SMALL_BYTES = 100


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
    (seal_it, open_it), message = _calls(algorithm, body)
    (seal_small, open_small), _ = _calls(algorithm, body[:_SMALL_BYTES])
    size, repeats = len(body), _REPEATS[len(body)]
    goal = ">= 0.6" if algorithm == "x25519" else ">= 0.5"
    title = f"{algorithm}, {size // 1_000_000} MB"
    rows = []
    for name, call, small in (("seal", seal_it, seal_small), ("open", open_it, open_small)):
        ours, digest = _times(call, lambda: hashlib.sha256(body).digest(), repeats)
        # The small call after a large digest: its code and tables have left the caches, as in a large call.
        fixed, _ = _times(small, lambda: hashlib.sha256(body).digest(), repeats)
        note = f"{size / ours / 1e6:.0f} MB/s; median of {repeats}; {fixed * 1e6:.0f} us of it for any size"
        rows.append(Row(f"{name}, {title}: speed / SHA-256", digest / ours, goal, note=note))
    overhead = float(len(message) - size)
    rows.append(
        Row(f"envelope overhead, {title}", overhead, unit="B", note="48 B of it for each record of 98,304 B")
    )
    return rows


def _times(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    return interleaved_medians(first, second, repeats=repeats, clock=time.thread_time)


def _calls(algorithm: str, body: bytes) -> tuple[tuple[Callable[[], object], Callable[[], object]], bytes]:
    """What seals `body`, what opens it, and the sealed message."""
    signer, kem = SigningKey.generate(), KemPrivateKey.generate(algorithm)
    public = kem.public_key
    header = Header(type="up", direction="up", tenant="t", fleet="f", device="d", epoch=1, seq=1)
    signers = {signer.key_id: Signer("d", signer.verify_key)}
    expect = Expect("up", "t", "f", "up", "d")

    def close() -> bytes:
        return seal(header, body, signer=signer, recipient=public)

    message = close()

    def opened() -> object:
        return open_sealed(
            message,
            signers=signers,
            recipients={kem.key_id: kem},
            expect=expect,
            now=0.0,
            limit_bytes=2 * len(message),
        )

    return (close, opened), message
