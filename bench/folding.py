"""Decoding and folding updates against copying the same float32 bytes."""

from __future__ import annotations

import numpy as np

from bench.table import Row, interleaved_medians
from cloud_server.aggregate.fold import Fold
from wire.codec import decode, encode
from wire.messages import CODEC_NAMES

_SIZE = 1_000_000


def measure() -> list[Row]:
    """One row a codec: time of decode and fold over time of memcpy; and the bytes of each codec."""
    rng = np.random.default_rng(0)
    vector = (rng.standard_normal(_SIZE) * 1e-3).astype(np.float32)
    rows = []
    for codec in CODEC_NAMES:
        data = encode(vector, codec, rng)
        fold = Fold(_SIZE)
        ours, copy = interleaved_medians(
            lambda data=data, codec=codec, fold=fold: fold.add(decode(data, codec, _SIZE), 1.0),  # type: ignore[misc]
            vector.copy,
        )
        note = f"{_SIZE / ours / 1e6:.0f} Mparam/s; {len(data) / vector.nbytes:.2%} of float32"
        rows.append(Row(f"decode and fold, {codec}: time / memcpy", ours / copy, note=note))
    return rows
