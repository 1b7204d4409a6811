"""A checkpoint as a difference to the one before: both sides compute old + decoded difference, bit for bit.

    patch = canonical CBOR of {"format": 1, "base": SHA-256 of the old checkpoint, "codec": name,
                               "params": the encoded difference, "buffers": …, "ranges": …}

Laws of the file: pure; float32, value by value, by the one function that both sides call, so that the result
has one hash; what the code leaves out is for the caller to keep (error feedback), and is in nothing that
travels; buffers and ranges are small and travel whole; a patch proves nothing by itself: whoever applies one
compares the hash of the result with the signed one. Source: docs/protocol.md, clause 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from wire.cbor import decode_canonical, encode_canonical
from wire.checkpoint import MAX_CHECKPOINT_BYTES, Checkpoint
from wire.codec import decode_into, encode
from wire.errors import BundleError, MessageError, UpdateError
from wire.messages import CodecName

FORMAT: Final = 1
DEFAULT_PATCH_CODEC: Final[CodecName] = "dithered"
_KEYS: Final = {"format", "base", "codec", "params", "buffers", "ranges"}
_DIGEST_BYTES: Final = 32

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """A coded step of a parameter vector.

    Attributes:
        codec: name of the code (clause 8).
        payload: the encoded difference.
        params: float32 [P], where the step leads to: old + decoded.
    """

    codec: str
    payload: bytes
    params: Float32


def code_difference(old: Float32, wanted: Float32, codec: str, seed: int) -> Difference:
    """Codes the step from `old` (float32 [P]) towards `wanted`, as near as the code comes.

    Args:
        seed: draws what the code draws; the same arguments give the same bytes.

    Raises:
        UpdateError: (us) the sizes differ, the difference is not finite or too large for the code.
    """
    if old.shape != wanted.shape:
        raise UpdateError("a patch needs two vectors of one size", size=old.size)
    rng = np.random.Generator(np.random.PCG64(seed))
    payload = encode(wanted - old, codec, rng)
    return Difference(codec, payload, _stepped(old, payload, codec))


def pack_patch(base_sha256: bytes, difference: Difference, new: Checkpoint) -> bytes:
    """The patch that leads from the checkpoint `base_sha256` to `new`.

    Raises:
        BundleError: (us) `new` does not have the parameters that the difference leads to.
    """
    if new.params.tobytes() != difference.params.tobytes():
        raise BundleError("a patch leads to other parameters than those of its checkpoint")
    return encode_canonical(
        {
            "format": FORMAT,
            "base": base_sha256,
            "codec": difference.codec,
            "params": difference.payload,
            "buffers": new.buffers.tobytes(),
            "ranges": new.ranges.tobytes(),
        }
    )


def make_patch(old: Checkpoint, new: Checkpoint, codec: str, seed: int) -> bytes:
    """A patch from `old` to as near to `new` as the code comes; `apply_patch` says where it leads to.

    Raises:
        UpdateError: (us) as `code_difference`.
    """
    difference = code_difference(old.params, new.params, codec, seed)
    return pack_patch(old.sha256, difference, Checkpoint(difference.params, new.buffers, new.ranges))


def apply_patch(old: Checkpoint, patch: bytes, *, limit_bytes: int = MAX_CHECKPOINT_BYTES) -> Checkpoint:
    """The checkpoint that a patch leads to from `old`; the caller compares its hash with the signed one.

    Raises:
        BundleError: (peer) not a patch, one on another checkpoint or of another model, or one that leads to
            a value that is not finite.
    """
    try:
        plain = decode_canonical(patch, limit_bytes=limit_bytes)
    except MessageError as error:
        raise BundleError(f"patch: {error}") from error
    _check_fields(plain)
    if plain["base"] != old.sha256:
        raise BundleError("patch: it is one on another checkpoint", base=plain["base"].hex())
    if (len(plain["buffers"]), len(plain["ranges"])) != (old.buffers.nbytes, old.ranges.nbytes):
        raise BundleError("patch: its buffers or ranges are another model's")
    try:
        params = _stepped(old.params, plain["params"], plain["codec"])
    except UpdateError as error:
        raise BundleError(f"patch: {error}") from error
    return Checkpoint(params, _array(plain["buffers"]), _array(plain["ranges"]).reshape(-1, 2))


def _stepped(old: Float32, payload: bytes, codec: str) -> Float32:
    """The one arithmetic of both sides: each value is decoded to float32 and added once."""
    params = old.astype(np.float32, copy=True)
    with np.errstate(over="ignore", invalid="ignore"):  # a checkpoint refuses what is not finite
        decode_into(params, payload, codec, weight=1.0)
    return params


def _check_fields(plain: Any) -> None:
    if not isinstance(plain, dict) or set(plain) != _KEYS:
        raise BundleError("patch: not a map of format, base, codec, params, buffers and ranges")
    if type(plain["format"]) is not int or plain["format"] != FORMAT:
        raise BundleError("patch: unknown format", format=plain["format"])
    is_bytes = all(isinstance(plain[name], bytes) for name in ("base", "params", "buffers", "ranges"))
    if not is_bytes or not isinstance(plain["codec"], str) or len(plain["base"]) != _DIGEST_BYTES:
        raise BundleError("patch: a field has another type or length than it must have")


def _array(data: bytes) -> Float32:
    return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)
