"""Short stand-ins of long vectors that keep the angles between them: cosines of a cohort, one update at a time.

Every value gets a random sign and is added to one of `SKETCH_SIZE` sums. Inner products keep their expectation, and a
cosine its value within about one in √`SKETCH_SIZE`: 0.011. The signs are drawn anew for each round, after the updates
came, so that nobody can send what looks unlike itself. Source: Charikar, Chen and Farach-Colton, "Finding frequent
items in data streams", ICALP 2002 (the count sketch), here with the place by position and no hash.

Laws of the file: the same seed gives the same signs on every device; a vector that is no longer than a sketch is its
own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

SKETCH_SIZE = 8191
"""A prime: places that follow the shape of a layer would add values up that belong together."""
_ROWS = 512


class Sketcher:
    """Makes sketches of float32 [size] vectors.

    Args:
        seed: draws the signs.
        sums: how long a sketch is; a prime.
        device: where the work is done.
    """

    def __init__(
        self, size: int, seed: int, *, sums: int = SKETCH_SIZE, device: torch.device | None = None
    ) -> None:
        self._size = size
        self._sums = sums
        self._device = device or torch.device("cpu")
        self._signs: torch.Tensor | None = None
        if size > sums:
            bits = np.unpackbits(np.random.default_rng(seed).integers(0, 256, -(-size // 8), dtype=np.uint8))
            self._signs = torch.from_numpy(bits[:size].astype(np.int8) * 2 - 1).to(self._device)

    def sketch(self, vector: NDArray[np.floating]) -> torch.Tensor:
        """Float64 [min(size, sums)] on the device."""
        source = vector if vector.flags.writeable else vector.copy()
        values = torch.from_numpy(source).to(self._device)
        if self._signs is None:
            return values.to(torch.float64)
        found = torch.zeros(self._sums, dtype=torch.float64, device=self._device)
        for start in range(0, self._size, _ROWS * self._sums):
            part = slice(start, start + _ROWS * self._sums)
            signed = values[part].double() * self._signs[part]
            whole = len(signed) // self._sums * self._sums
            found += signed[:whole].view(-1, self._sums).sum(dim=0)
            found[: len(signed) - whole] += signed[whole:]
        return found


def unit_rows(sketches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sketches as rows of length 1, float64 [K, D]; what is zero stays zero."""
    rows = torch.stack(list(sketches))
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.div_(lengths.clamp(min=torch.finfo(torch.float64).tiny))
