"""Damage by seed: to bytes, to structures, and to the spelling of a structure that stays the same."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from random import Random
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 23, 24, 255, 256, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63),
    0.0, 1.0, -0.0, 1.5, 1e300, float("inf"), float("-inf"), float("nan"),
    b"", b"\0", bytes(8), bytes(11), bytes(12), bytes(16), bytes(32), bytes(33), b"\xff" * 48, bytes(64), bytes(1025),
    "", "x", "up", "*", "a/b", "watch-1", "watch-1\n", "é" * 10, "x" * 65, "\x00", "+",
    [], [[]], [None] * 9, [0, 0, 0], {}, {1: 2}, {0: b""}, {1: b""}, {-1: b""}, {"a": b""}, {-1: 1}, {True: 1},
)  # fmt: skip
"""Values that decoders got wrong before: borders of widths and types, wrong types, too much."""


def mutated_bytes(random: Random, data: bytes) -> bytes:
    """`data` after one to three changes; it may come out as it was."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice(_BYTE_CHANGES)(random, out)
    return bytes(out)


def _place(random: Random, data: bytearray) -> int:
    """Mostly anywhere, often near the front, where the heads of structures are."""
    if not data:
        return 0
    return random.randrange(min(len(data), 64) if random.random() < 0.3 else len(data))


def _flip(random: Random, data: bytearray) -> None:
    if data:
        data[_place(random, data)] ^= 1 << random.randrange(8)


def _overwrite(random: Random, data: bytearray) -> None:
    if data:
        data[_place(random, data)] = random.choice(
            (0, 1, 0x17, 0x18, 0x7F, 0x80, 0xF6, 0xFF, random.randrange(256))
        )


def _insert(random: Random, data: bytearray) -> None:
    at = _place(random, data)
    data[at:at] = random.randbytes(random.randrange(1, 9))


def _delete(random: Random, data: bytearray) -> None:
    at = _place(random, data)
    del data[at : at + random.randrange(1, 9)]


def _cut(random: Random, data: bytearray) -> None:
    del data[_place(random, data) :]


def _append(random: Random, data: bytearray) -> None:
    data += random.randbytes(random.randrange(1, 20))


def _repeat(random: Random, data: bytearray) -> None:
    start, end = sorted((_place(random, data), _place(random, data)))
    data[end:end] = data[start : min(end, start + 256)]


def _reverse(random: Random, data: bytearray) -> None:
    start, end = sorted((_place(random, data), _place(random, data)))
    data[start:end] = data[start:end][::-1]


def _number(random: Random, data: bytearray) -> None:
    """A border of some width, in either byte order."""
    at = _place(random, data)
    width = random.choice((1, 2, 4, 8))
    value = random.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1))
    data[at : at + width] = value.to_bytes(width, random.choice(("big", "little")))


_BYTE_CHANGES: tuple[Callable[[Random, bytearray], None], ...] = (
    _flip, _flip, _overwrite, _insert, _delete, _cut, _append, _repeat, _reverse, _number,
)  # fmt: skip


# --- structures ---


def mutated_value(random: Random, value: Any, nasty: tuple[Any, ...] = NASTY) -> Any:
    """A copy of lists, dictionaries and scalars in which one place is another."""
    out = [copy.deepcopy(value)]
    places: list[tuple[Any, Any]] = []
    _walk(out, places)
    container, key = random.choice(places)
    change = random.random()
    if change < 0.45:
        container[key] = copy.deepcopy(random.choice(nasty))
    elif change < 0.75:
        container[key] = _nudged(random, container[key])
    elif container is not out and change < 0.85:
        del container[key]
    elif isinstance(container, list) and container is not out:
        container.insert(key, copy.deepcopy(random.choice((container[key], random.choice(nasty)))))
    elif isinstance(container, dict):
        container[random.choice((0, 16, 99, -9, "x", "format", True))] = random.choice(nasty)
    else:
        container[key] = [container[key]]
    return out[0]


def _walk(container: Any, places: list[tuple[Any, Any]]) -> None:
    for key, inner in list(container.items() if isinstance(container, dict) else enumerate(container)):
        places.append((container, key))
        if isinstance(inner, (list, dict)):
            _walk(inner, places)


def _nudged(random: Random, value: Any) -> Any:
    """Something close by, which passes the first checks and meets the later ones."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + random.choice((-1, 1, 2, -value, value, 256))
    if isinstance(value, float):
        return random.choice((-value, value * 2, float(int(value)) if abs(value) < 1e15 else 0.0))
    if isinstance(value, bytes):
        return mutated_bytes(random, value)
    if isinstance(value, str):
        return random.choice((value[:-1], value + "x", value[::-1], value.upper(), value + "\n"))
    return value if value is None else type(value)()


# --- spelling ---


def respelled(random: Random, value: Any, rate: float = 0.15) -> bytes:
    """CBOR of the same value that is not canonical: long forms, indefinite lengths, another order, keys twice."""
    return b"".join(_spelled(random, value, rate))


def _spelled(random: Random, value: Any, rate: float) -> list[bytes]:
    odd = random.random() < rate
    if isinstance(value, dict):
        items = [item for pair in value.items() for item in pair]
        pairs = [
            [part for item in items[at : at + 2] for part in _spelled(random, item, rate)]
            for at in range(0, len(items), 2)
        ]
        if odd:
            change = random.randrange(3)
            if change == 0:
                random.shuffle(pairs)
            elif change == 1 and pairs:
                pairs.append(pairs[0])
        return _container(random, 5, pairs, odd)
    if isinstance(value, list):
        return _container(random, 4, [_spelled(random, item, rate) for item in value], odd)
    if isinstance(value, (bytes, str)):
        data, major = (value, 2) if isinstance(value, bytes) else (value.encode(), 3)
        if odd and random.random() < 0.3:
            return [bytes([major << 5 | 31]), _head(random, major, len(data), False), data, b"\xff"]
        return [_head(random, major, len(data), odd), data]
    if isinstance(value, bool) or value is None:
        return [
            {False: b"\xf4", True: b"\xf5", None: b"\xf6"}[value]
            if not odd
            else b"\xf8" + bytes([32 + bool(value)])
        ]
    if isinstance(value, float):
        return [b"\xfb" + struct.pack(">d", value)]
    return [_head(random, 1, -1 - value, odd) if value < 0 else _head(random, 0, value, odd)]


def _container(random: Random, major: int, items: list[list[bytes]], odd: bool) -> list[bytes]:
    parts = [part for item in items for part in item]
    if odd and random.random() < 0.3:
        return [bytes([major << 5 | 31]), *parts, b"\xff"]
    return [_head(random, major, len(items), odd), *parts]


def _head(random: Random, major: int, argument: int, odd: bool) -> bytes:
    widths = [width for width in (1, 2, 4, 8) if argument < 256**width]
    if argument < 24 and not (odd and widths):
        return bytes([major << 5 | argument])
    width = random.choice(widths) if odd else widths[0]
    return bytes([major << 5 | 24 + (1, 2, 4, 8).index(width)]) + argument.to_bytes(width, "big")
