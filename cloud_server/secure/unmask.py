"""From masked updates and told shares to the exact sum: the seeds are put together, and every mask taken away.

Laws of the file: pure; the sum is that of the encodings, bit for bit, or there is none; a secret counts only if it is
the one that its device committed to (the mask key by its public half, the seed by its commitment), so that wrong
shares cost a round at most and never falsify it; of a device either secret is put together, never both. Source:
docs/protocol.md, clause 13; Bonawitz et al. 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from cloud_server.secure.book import MaskBook
from wire import shamir
from wire.errors import RoundError, UpdateError
from wire.masking import SECRET_BYTES, commitment_of, mask_key_of, pair_mask_key, self_mask_key
from wire.ring import Ring, RingVector, add_mask

_TRIES = 64
Share = tuple[int, bytes]


def unmask(book: MaskBook, updates: Iterable[tuple[str, RingVector]], ring: Ring, size: int) -> RingVector:
    """The sum of the encodings of all devices that delivered, modulo the ring.

    Args:
        updates: device and masked vector [P] of each that delivered, once.

    Raises:
        RoundError: too few shares, or none that fit together, for a secret that is needed; or an update is missing.
    """
    total, summed = np.zeros(size, ring.dtype), set()
    seeds = {device: _self_seed(book, device) for device in sorted(book.delivered)}
    lost = {device: _mask_seed(book, device) for device in sorted(book.lost)}
    for device, vector in updates:
        if device not in seeds or device in summed:
            raise RoundError("a masked update that is not one of the sum", device=device)
        summed.add(device)
        np.add(total, vector, out=total)
    if len(summed) != len(seeds):
        raise RoundError(f"{len(seeds) - len(summed)} masked updates are missing")
    context = book.group.context
    for seed in seeds.values():
        add_mask(total, self_mask_key(context, seed), negative=True)
    for device, seed in lost.items():
        _take_away(book, device, seed, total)
    return total


def _take_away(book: MaskBook, device: str, seed: bytes, total: RingVector) -> None:
    """What the neighbours of a device that was lost had in common with it."""
    context, group = book.group.context, book.group
    own = mask_key_of(context, seed)
    for neighbour in group.neighbours_of(device):
        if neighbour in book.delivered:
            key = pair_mask_key(context, own, book.keys[neighbour].mask_key)
            # The neighbour added it where the graph says so; here it is undone.
            add_mask(total, key, negative=group.is_added(neighbour, device))


def _self_seed(book: MaskBook, device: str) -> bytes:
    wanted = book.keys[device].commitment
    return _recover(book, device, lambda seed: commitment_of(book.group.context, seed) == wanted)


def _mask_seed(book: MaskBook, device: str) -> bytes:
    wanted = book.keys[device].mask_key
    return _recover(book, device, lambda seed: mask_key_of(book.group.context, seed).public_bytes == wanted)


def _recover(book: MaskBook, device: str, is_right: Callable[[bytes], bool]) -> bytes:
    """The secret that the shares of a device give back.

    Any `threshold` of them do; where one is wrong, those beside it are tried: every run of the right length around
    the ring of shares, so a single liar is always passed by.
    """
    shares, threshold = list(_shares_of(book, device)), book.group.terms.threshold
    if len(shares) < threshold:
        raise RoundError(f"{len(shares)} of {threshold} shares of a secret of {device}", device=device)
    for start in range(min(len(shares), _TRIES)):
        seed = _combined([*shares, *shares][start : start + threshold])
        if seed is not None and is_right(seed):
            return seed
        if len(shares) == threshold:
            break
    raise RoundError(f"shares of a secret of {device} do not fit together", device=device)


def _combined(shares: Sequence[Share]) -> bytes | None:
    try:
        return shamir.combine(shares)
    except UpdateError:
        return None


def _shares_of(book: MaskBook, device: str) -> Iterator[Share]:
    """The shares that neighbours told of a device's secret; the point is the neighbour's place with the device."""
    for point, neighbour in enumerate(book.group.neighbours_of(device), start=1):
        opened = book.opened.get(neighbour)
        if opened is not None:
            piece = opened.pieces[book.group.place_of(neighbour, device)]
            if len(piece) == SECRET_BYTES:
                yield point, piece
