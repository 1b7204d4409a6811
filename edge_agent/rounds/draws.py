"""Random numbers that follow from a seed, on every machine and with every version of numpy (whose own streams may
change, NEP 19), without `numpy.random`, which costs an agent 3 MiB for as long as it lives.

Law of the file: what is drawn depends on the seed and on the order of the calls, and on nothing else. Source: FIPS
202 (SHAKE256).
"""

from __future__ import annotations

import builtins
import hashlib

import numpy as np

from edge_agent.ports import Integers


class Draws:
    """One stream of random numbers.

    Args:
        seed: 0 to 2⁶⁴ − 1.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed.to_bytes(8, "little")
        self._calls = 0

    def bytes(self, length: int) -> builtins.bytes:
        """The next bytes; every call draws anew."""
        self._calls += 1
        return hashlib.shake_256(self._seed + self._calls.to_bytes(8, "little")).digest(length)

    def permutation(self, count: int) -> Integers:
        """0 … count − 1 in random order, int64 [count]."""
        return np.argsort(np.frombuffer(self.bytes(8 * count), "<u8"), kind="stable")
