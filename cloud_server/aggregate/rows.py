"""A cohort's updates as the rows of one matrix: what every robust rule works on.

Above 64 replies the rows are means of random buckets, so that memory and the work of a rule stay bounded; a bucket
of s replies holds a false one with s times the chance, which lowers the share of attackers that a rule
withstands by the same factor and makes honest rows more alike. Source: Karimireddy, He and Jaggi,
"Byzantine-robust learning on heterogeneous datasets via bucketing", arXiv:2006.09365.

Laws of the file: values are finite (screening saw to it); one vector at a time is read; the same seed gives
the same buckets.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from wire.errors import UpdateError

MAX_ROWS = 64


def bucket_count(replies: int, *, max_rows: int = MAX_ROWS) -> int:
    """How many rows so many replies make: themselves up to `max_rows`, else the most buckets of equal size (± 1
    reply)."""
    if replies <= max_rows:
        return replies
    per_bucket = -(-replies // max_rows)
    return -(-replies // per_bucket)


def gather_rows(
    vectors: Iterable[NDArray[np.float32]],
    count: int,
    size: int,
    *,
    device: torch.device,
    seed: int,
    max_rows: int = MAX_ROWS,
) -> torch.Tensor:
    """The updates as float32 [rows, size], rows ≤ `max_rows`.

    Args:
        vectors: `count` vectors, float32 [size].
        seed: draws which replies share a bucket; it decides nothing while there are no buckets.

    Raises:
        UpdateError: (us) no vector, another number of them than `count`, or another shape or type.
    """
    if count < 1:
        raise UpdateError("no update to aggregate")
    rows = bucket_count(count, max_rows=max_rows)
    places = np.arange(count) % rows
    if rows < count:
        np.random.default_rng(seed).shuffle(places)
    sizes = np.bincount(places, minlength=rows)
    matrix = torch.zeros((rows, size), dtype=torch.float32, device=device)
    seen = 0
    for vector in vectors:
        if seen == count or vector.dtype != np.float32 or vector.shape != (size,):
            raise UpdateError(f"cannot gather update {seen} of {count}: {vector.dtype} {vector.shape}")
        row = int(places[seen])
        source = vector if vector.flags.writeable else vector.copy()
        matrix[row].add_(torch.from_numpy(source).to(device), alpha=1.0 / int(sizes[row]))
        seen += 1
    if seen != count:
        raise UpdateError(f"cannot gather {count} updates, there are {seen}")
    return matrix
