"""What both sides of a masked round compute alike: ring, graph, roster, keys and masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire import masking
from wire.errors import MessageError, TrustError, UpdateError
from wire.mask_terms import MaskTerms
from wire.masking import Roster, neighbours
from wire.primitives import AgreementKey, Keystream, hkdf
from wire.ring import (
    Ring,
    add_mask,
    choose_ring,
    decode_mean,
    encode_ring,
    ring_of,
    ring_vector,
    value_bits_of,
)

MEMBERS = [("b", b"B" * 32), ("a", b"A" * 32), ("c", b"C" * 32)]


class Noise:
    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def bytes(self, length: int) -> bytes:
        return self._rng.bytes(length)


def terms(**changes: object) -> MaskTerms:
    values = {
        "roster_sha256": bytes(32),
        "members": 3,
        "degree": 2,
        "threshold": 2,
        "ring": "ring32",
        "value_bits": 30,
        "bound": 1.0,
    }
    return MaskTerms(**{**values, **changes})  # type: ignore[arg-type]


# --- primitives ---


def test_hkdf_gives_the_answer_of_its_rfc() -> None:
    """RFC 5869, A.3: SHA-256 without salt and info."""
    assert hkdf(b"\x0b" * 22, b"").hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


def test_agreement_gives_the_answer_of_its_rfc() -> None:
    """RFC 7748, 6.1."""
    bob = AgreementKey(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert bob.agree(alice).hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert bob.public_bytes.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"


def test_keystream_is_aes_256_in_counter_mode() -> None:
    """FIPS 197, C.3 gives AES-256 of a block; the counter begins at zero, so the first block is that of zeros."""
    stream = Keystream(bytes(32))
    assert stream.next(bytes(16)).hex() == "dc95c078a2408989ad48a21492842087"
    assert stream.next(bytes(16)) == Keystream(bytes(32)).next(bytes(32))[16:]


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"short"], ids=["zero", "one", "short"])
def test_key_that_makes_every_secret_the_same_is_refused(public: bytes) -> None:
    with pytest.raises(TrustError):
        AgreementKey(bytes(range(32))).agree(public)


# --- the ring ---


@given(
    members=st.integers(3, 1024),
    size=st.integers(1, 10**7),
    bound=st.floats(1e-3, 1e3),
)
def test_sum_of_all_members_fits_the_ring(members: int, size: int, bound: float) -> None:
    ring = choose_ring(members, size, bound)
    assert members * ((1 << ring.value_bits) - 1) < 1 << ring.bits
    assert 2 * members * ((1 << ring.value_bits + 1) - 1) >= 1 << ring.bits


def test_ring_is_narrow_only_where_rounding_costs_nothing() -> None:
    assert choose_ring(10, 100, 1.0).bits == 16
    assert choose_ring(100, 100_000, 1.0).bits == 32


@given(
    seed=st.integers(0, 2**32),
    devices=st.integers(3, 40),
    ring_bits=st.sampled_from([16, 32]),
)
def test_mean_of_encodings_is_the_mean(seed: int, devices: int, ring_bits: int) -> None:
    rng = np.random.default_rng(seed)
    value_bits = value_bits_of(ring_bits, devices)
    ring = Ring(ring_bits, value_bits, 2.0)
    vectors = rng.uniform(-2.0, 2.0, (devices, 50)).astype(np.float32)
    total = np.zeros(50, ring.dtype)
    for vector in vectors:
        total += encode_ring(vector, ring, Noise(seed))
    error = np.abs(decode_mean(total, ring, devices) - vectors.mean(axis=0))
    assert error.max() <= ring.step + 1e-6


def test_encoding_is_unbiased_and_cut_at_the_bound() -> None:
    ring = Ring(16, 4, 1.0)
    mean = decode_mean(encode_ring(np.full(100_000, 0.3, np.float32), ring, Noise(1)), ring, 1).mean()
    assert abs(mean - 0.3) < 0.001
    cut = encode_ring(np.array([-9.0, 9.0], np.float32), ring, Noise(1))
    assert cut.tolist() == [0, 15]


@pytest.mark.parametrize("length", [0, 3, 7, 12])
def test_payload_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(UpdateError):
        ring_vector(bytes(length), Ring(32, 20, 1.0), 2)


def test_terms_whose_sum_would_overflow_are_refused() -> None:
    with pytest.raises(MessageError):
        ring_of(terms(value_bits=31))
    assert ring_of(terms()).bits == 32


@pytest.mark.parametrize("bits", [16, 32])
def test_mask_comes_off_bit_for_bit(bits: int) -> None:
    ring = Ring(bits, 8, 1.0)
    values = np.arange(200_000).astype(ring.dtype)
    masked = values.copy()
    add_mask(masked, b"k" * 32)
    assert np.count_nonzero(masked == values) < 100
    add_mask(masked, b"k" * 32, negative=True)
    assert np.array_equal(masked, values)


# --- roster and graph ---


def test_roster_is_the_same_in_any_order() -> None:
    assert Roster.of(MEMBERS) == Roster.of(MEMBERS[::-1])
    assert Roster.of(MEMBERS).devices == ("a", "b", "c")


@pytest.mark.parametrize(
    "members",
    [
        MEMBERS[:2],
        [*MEMBERS, ("a", b"D" * 32)],
        [*MEMBERS, ("d", b"A" * 32)],
        [(f"d{i}", i.to_bytes(32, "big")) for i in range(1025)],
    ],
    ids=["too few", "name twice", "key twice", "too many"],
)
def test_roster_that_cannot_be_is_refused(members: list[tuple[str, bytes]]) -> None:
    with pytest.raises(MessageError):
        Roster.of(members)


@given(
    members=st.integers(3, 80),
    half=st.integers(1, 40),
    seed=st.binary(min_size=4, max_size=4),
)
def test_graph_is_symmetric_and_regular(members: int, half: int, seed: bytes) -> None:
    graph = neighbours(members, 2 * half, seed)
    degree = min(2 * half, members - 1)
    assert all(len(near) == degree and place not in near for place, near in enumerate(graph))
    assert all(place in graph[other] for place, near in enumerate(graph) for other in near)


def test_graph_follows_from_its_seed() -> None:
    assert neighbours(30, 8, b"one") == neighbours(30, 8, b"one") != neighbours(30, 8, b"two")


# --- keys ---


def test_every_part_of_the_round_changes_its_keys() -> None:
    base = ("t", "f", "run", 1, terms())
    changed = [
        ("x", "f", "run", 1, terms()),
        ("t", "x", "run", 1, terms()),
        ("t", "f", "x", 1, terms()),
        ("t", "f", "run", 2, terms()),
        ("t", "f", "run", 1, terms(roster_sha256=b"x" * 32)),
        ("t", "f", "run", 1, terms(threshold=3)),
        ("t", "f", "run", 1, terms(bound=2.0)),
    ]
    contexts = {masking.context_of(*each) for each in (base, *changed)}
    assert len(contexts) == 1 + len(changed)


def test_both_ends_agree_on_masks_and_channels_go_one_way() -> None:
    context, one, two = b"c" * 32, AgreementKey(b"1" * 32), AgreementKey(b"2" * 32)
    assert masking.pair_mask_key(context, one, two.public_bytes) == masking.pair_mask_key(
        context, two, one.public_bytes
    )
    there = masking.channel_secret(context, one, two.public_bytes, "a", "b")
    assert there == masking.channel_secret(context, two, one.public_bytes, "a", "b")
    assert there != masking.channel_secret(context, two, one.public_bytes, "b", "a")
