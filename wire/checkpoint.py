"""A model's parameters at one moment: flat params, buffers and activation ranges, as canonical bytes.

Laws of the file: little-endian float32 only, all finite; what decodes re-encodes to the same bytes, so the
SHA-256 of the bytes names the checkpoint; nothing is decoded above the caller's limit.
Source: docs/architecture.md, "Bundle, checkpoint, release".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wire.cbor import decode_canonical, encode_canonical
from wire.errors import BundleError, MessageError

if TYPE_CHECKING:
    from wire.manifest import Manifest

FORMAT = 1
MAX_CHECKPOINT_BYTES = 256 * 1024 * 1024
_KEYS = {"format", "params", "buffers", "ranges"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Parameters of one model. Two checkpoints are equal when their bytes are.

    Attributes:
        params: float32 [P].
        buffers: float32 [Q], such as BatchNorm statistics.
        ranges: float32 [R, 2], (min, max) of each quantized activation; [0, 2] in a train-only head.

    Raises:
        BundleError: (us or the peer) another type or shape, a value that is not finite, or min above max.
    """

    params: NDArray[np.float32]
    buffers: NDArray[np.float32]
    ranges: NDArray[np.float32]

    def __post_init__(self) -> None:
        for name, axes in (("params", 1), ("buffers", 1), ("ranges", 2)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != axes:
                raise BundleError(f"checkpoint: {name} is not float32 with {axes} axes", name=name)
            # A private, read-only copy: a frozen value whose arrays change under it would break its own hash.
            # What lies over `bytes` cannot change and needs none.
            is_fixed = isinstance(array.base, bytes) and array.flags.c_contiguous
            own = array if is_fixed else np.array(array, dtype="<f4", order="C", copy=True)
            if not np.isfinite(own).all():
                raise BundleError(f"checkpoint: {name} holds a number that is not finite", name=name)
            own.setflags(write=False)
            object.__setattr__(self, name, own)
        if self.ranges.shape[1] != 2 or (self.ranges[:, 0] > self.ranges[:, 1]).any():
            raise BundleError("checkpoint: a range is not (min, max)")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def to_bytes(self) -> bytes:
        """Canonical CBOR of the three raw arrays and the format number."""
        return self._encoded

    @cached_property
    def _encoded(self) -> bytes:
        arrays = {name: getattr(self, name).tobytes() for name in ("params", "buffers", "ranges")}
        return encode_canonical({"format": FORMAT, **arrays})

    @cached_property
    def sha256(self) -> bytes:
        """SHA-256 of `to_bytes()`, 32 bytes: the checkpoint's name."""
        return hashlib.sha256(self._encoded).digest()

    @classmethod
    def from_bytes(
        cls, data: bytes, limit_bytes: int = MAX_CHECKPOINT_BYTES, *, sha256: bytes | None = None
    ) -> Checkpoint:
        """Reads a checkpoint.

        Args:
            limit_bytes: refused above this size before anything is decoded.
            sha256: of `data`, from a caller who has compared it; computed when asked for if not given.

        Raises:
            BundleError: (peer or disk) not canonical, an unknown or missing key, a wrong type, not finite.
        """
        try:
            plain = decode_canonical(data, limit_bytes=limit_bytes)
        except MessageError as error:
            raise BundleError(f"checkpoint: {error}") from error
        if not isinstance(plain, dict) or set(plain) != _KEYS:
            raise BundleError("checkpoint: not a map of format, params, buffers and ranges")
        if type(plain["format"]) is not int or plain["format"] != FORMAT:
            raise BundleError("checkpoint: unknown format", format=plain["format"])
        checkpoint = cls(
            params=_array(plain["params"], 4),
            buffers=_array(plain["buffers"], 4),
            ranges=_array(plain["ranges"], 8).reshape(-1, 2),
        )
        # What decodes re-encodes to the same bytes: whoever asks for them or for their hash gets these.
        checkpoint.__dict__["_encoded"] = bytes(data)
        if sha256 is not None:
            checkpoint.__dict__["sha256"] = sha256
        return checkpoint

    def check(self, manifest: Manifest) -> None:
        """Compares the sizes with a model's.

        Raises:
            BundleError: the checkpoint is of another model.
        """
        found = (self.params.size, self.buffers.size, len(self.ranges))
        wanted = (manifest.params_size, manifest.buffers_size, manifest.ranges_count)
        if found != wanted:
            raise BundleError(
                f"checkpoint has (params, buffers, ranges) {found}, {manifest.model} has {wanted}",
                hint="the checkpoint was made for another model",
                found=found,
                wanted=wanted,
            )


def _array(value: object, item_bytes: int) -> NDArray[np.float32]:
    if not isinstance(value, bytes) or len(value) % item_bytes:
        raise BundleError("checkpoint: an array is not whole float32 values")
    return np.frombuffer(value, dtype="<f4").astype(np.float32, copy=False)
