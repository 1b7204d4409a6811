"""Patches: the same bytes on both sides, few of them, and any bytes in give a checkpoint or a `BundleError`."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from wire.blobs import make_ref
from wire.cbor import decode_canonical, encode_canonical
from wire.checkpoint import Checkpoint
from wire.codec import decode
from wire.errors import BundleError, UpdateError
from wire.messages import CODEC_NAMES, HeadPatch, Invitation, TrainConfig, decode_body, encode_body
from wire.patch import apply_patch, code_difference, make_patch, pack_patch

SIZE = 3000
# Error of one coded step, ‖left out‖ / ‖step‖, for normally distributed values (clause 8.6).
LEFT_OUT = {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.02, "int4": 0.25, "int2": 0.5, "sign": 0.8, "dithered": 0.6}


def normal(*labels: int, size: int = SIZE, scale: float = 1.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(labels).standard_normal(size)).astype(np.float32)


def checkpoint(params: NDArray[np.float32], number: int = 0) -> Checkpoint:
    ranges = np.sort(normal(number, 8, size=6)).reshape(-1, 2)
    return Checkpoint(params, normal(number, 9, size=4), ranges)


OLD = checkpoint(normal(1), 1)
NEW = checkpoint(OLD.params + normal(2, scale=0.01), 2)


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_both_sides_compute_the_same_checkpoint(codec: str) -> None:
    difference = code_difference(OLD.params, NEW.params, codec, 7)
    cloud = Checkpoint(difference.params, NEW.buffers, NEW.ranges)
    device = apply_patch(Checkpoint.from_bytes(OLD.to_bytes()), pack_patch(OLD.sha256, difference, cloud))
    assert device.to_bytes() == cloud.to_bytes()
    # By the letter: decoded to float32, then added once.
    assert device.params.tobytes() == (OLD.params + decode(difference.payload, codec, SIZE)).tobytes()
    step = NEW.params - OLD.params
    left_out = np.linalg.norm(NEW.params - device.params) / np.linalg.norm(step)
    assert left_out <= LEFT_OUT[codec]


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_same_arguments_give_the_same_bytes(codec: str) -> None:
    assert make_patch(OLD, NEW, codec, 7) == make_patch(OLD, NEW, codec, 7)


def test_another_process_with_other_processor_features_computes_the_same() -> None:
    patch = make_patch(OLD, NEW, "dithered", 7)
    program = (
        "import sys; from wire.checkpoint import Checkpoint; from wire.patch import apply_patch\n"
        "old, patch = (bytes.fromhex(line) for line in sys.stdin.read().split())\n"
        "print(apply_patch(Checkpoint.from_bytes(old), patch).sha256.hex())"
    )
    features = {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input=f"{OLD.to_bytes().hex()}\n{patch.hex()}",
        env={**os.environ, **features},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == apply_patch(OLD, patch).sha256.hex()


def test_default_code_is_a_small_part_of_the_checkpoint() -> None:
    old = checkpoint(normal(1, size=40_000))
    new = checkpoint(old.params + normal(2, size=40_000, scale=0.01))
    assert len(make_patch(old, new, "dithered", 7)) <= 0.06 * len(new.to_bytes())


@pytest.mark.parametrize("codec", ["int8", "int4", "dithered", "int2", "sign"])
def test_chain_of_patches_with_residual_stays_near_the_true_head(codec: str) -> None:
    """What one step leaves out is made up for by the next: after 50 the distance is that of about one step."""
    true, head = OLD.params.astype(np.float64), OLD
    residual = np.zeros(SIZE, np.float32)
    largest = 0.0
    for number in range(50):
        update = normal(3, number, scale=0.01)
        true = true + update
        wanted = head.params + update + residual
        patch = make_patch(head, checkpoint(wanted, number), codec, number)
        head = apply_patch(head, patch)
        residual = wanted - head.params
        largest = max(largest, float(np.linalg.norm(true - head.params) / np.linalg.norm(update)))
    # `sign` and `int2` leave out most of a step, so that more than one is owed at a time.
    assert largest <= {"int8": 0.02, "int4": 0.3, "dithered": 0.7, "int2": 1.0, "sign": 3.0}[codec]


def test_patch_on_another_checkpoint_is_refused() -> None:
    with pytest.raises(BundleError, match="another checkpoint"):
        apply_patch(NEW, make_patch(OLD, NEW, "int8", 7))


def test_patch_of_another_model_is_refused() -> None:
    small = checkpoint(normal(1, size=10))
    plain = decode_canonical(make_patch(OLD, NEW, "int8", 7), limit_bytes=10**6)
    with pytest.raises(BundleError):
        apply_patch(small, encode_canonical({**plain, "base": small.sha256}))
    for name in ("buffers", "ranges"):
        with pytest.raises(BundleError, match="another model"):
            apply_patch(OLD, encode_canonical({**plain, name: b""}))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": True},
        {"codec": "int9"},
        {"codec": "int4"},
        {"codec": 3},
        {"base": b"short"},
        {"params": b""},
        {"params": "text"},
        {"extra": 0},
    ],
)
def test_patch_with_a_wrong_field_is_refused(change: dict[str, object]) -> None:
    plain = decode_canonical(make_patch(OLD, NEW, "int8", 7), limit_bytes=10**6)
    with pytest.raises(BundleError):
        apply_patch(OLD, encode_canonical({**plain, **change}))


def test_patch_that_leads_beyond_float32_is_refused() -> None:
    far = checkpoint(np.full(SIZE, 3e38, np.float32))
    patch = make_patch(checkpoint(np.zeros(SIZE, np.float32)), far, "fp32", 7)
    plain = decode_canonical(patch, limit_bytes=10**6)
    with pytest.raises(BundleError, match="not finite"):
        apply_patch(far, encode_canonical({**plain, "base": far.sha256}))


def test_patch_above_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(BundleError):
        apply_patch(OLD, make_patch(OLD, NEW, "int8", 7), limit_bytes=1000)


def test_patch_between_two_sizes_is_not_made() -> None:
    with pytest.raises(UpdateError):
        make_patch(OLD, checkpoint(normal(1, size=10)), "int8", 7)


def test_patch_that_leads_elsewhere_is_not_packed() -> None:
    difference = code_difference(OLD.params, NEW.params, "int8", 7)
    with pytest.raises(BundleError):
        pack_patch(OLD.sha256, difference, NEW)


@given(st.data())
def test_damaged_patch_gives_a_checkpoint_or_our_error(data: st.DataObject) -> None:
    patch = bytearray(make_patch(OLD, NEW, data.draw(st.sampled_from(CODEC_NAMES)), 7))
    at = data.draw(st.integers(0, len(patch) - 1))
    patch[at] ^= data.draw(st.integers(1, 255))
    try:
        assert apply_patch(OLD, bytes(patch)) is not None
    except BundleError:
        return


def test_invitation_says_nothing_of_a_patch_that_there_is_not() -> None:
    ref = make_ref(NEW.to_bytes())[0]
    plain: dict[str, Any] = {
        "run": "spring",
        "round_number": 3,
        "open": True,
        "deadline": 1e9,
        "graphs_sha256": bytes(32),
        "head": ref,
        "train": TrainConfig(),
    }
    without = decode_canonical(encode_body(Invitation(**plain)), limit_bytes=10**6)
    assert set(without) == set(plain)
    patch = HeadPatch(base_sha256=OLD.sha256, blob=make_ref(make_patch(OLD, NEW, "int8", 7))[0])
    invitation = Invitation(**plain, head_on_need=True, patch=patch)
    assert decode_body(encode_body(invitation), Invitation) == invitation


def test_bytes_are_the_documented_vector() -> None:
    old = Checkpoint(
        np.array([1.0, -2.0], np.float32), np.array([0.5], np.float32), np.array([[-1, 3]], np.float32)
    )
    new = Checkpoint(np.array([1.5, -2.25], np.float32), old.buffers, np.array([[-1, 4]], np.float32))
    # By hand: map of 6, keys by length then bytes; the difference as an update of clause 8.
    expected = (
        b"\xa6"
        + b"\x64base\x58\x20" + old.sha256
        + b"\x65codec\x64fp32"
        + b"\x66format\x01"
        + b"\x66params\x50" + bytes.fromhex("0100000102000000" "0000003f000080be")
        + b"\x66ranges\x48" + bytes.fromhex("000080bf00008040")
        + b"\x67buffers\x44" + bytes.fromhex("0000003f")
    )  # fmt: skip
    assert make_patch(old, new, "fp32", 0) == expected
    assert apply_patch(old, expected) == new
