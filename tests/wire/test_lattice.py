"""Numbers and noise that devices mask: the same on every machine, wrapped without harm, bound into the round's keys."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import msgspec
import numpy as np
import pytest

from wire.errors import ConfigurationError, MessageError
from wire.lattice import Lattice, add_noise, noisy_mean
from wire.mask_terms import MaskTerms, NoiseTerms
from wire.masking import context_of
from wire.messages import Order, decode_body, encode_body
from wire.ring import ring_of

NOISE = NoiseTerms(clipping_norm=0.5, radius=100_000, sigma=30_000, quorum=3)
TERMS = MaskTerms(
    roster_sha256=bytes(32), members=4, degree=2, threshold=2, ring="ring32", value_bits=29, bound=0.5
)
SEED = bytes(range(32))
KNOWN = "fbfdae3aaa9ee759880ea1b7fe33b9b8e2f6772013112fc1308d744c69a64767"


def test_same_seed_gives_the_same_numbers_on_every_machine() -> None:
    update = (np.arange(64) / 640 - 0.05).astype(np.float32)
    masked = add_noise(update, NOISE, SEED)
    assert masked.dtype == np.dtype("<u4")
    assert hashlib.sha256(masked.tobytes()).hexdigest() == KNOWN


def test_another_seed_gives_other_noise() -> None:
    nothing = np.zeros(1000, np.float32)
    first, second = (add_noise(nothing, NOISE, seed).view("<i4").astype(float) for seed in (SEED, bytes(32)))
    assert abs(first.std() / NOISE.sigma - 1) < 0.12
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.16


def test_negative_sums_come_back_with_their_sign() -> None:
    lattice = Lattice.of(NOISE.clipping_norm, Fraction(NOISE.radius), 4)
    total = np.array([0, 5, 2**32 - 5, 2**31 - 1], "<u4")
    mean = noisy_mean(total, NOISE, 2).astype(np.float64)
    assert mean == pytest.approx(np.array([0, 5, -5, 2**31 - 1]) * lattice.step / 2)


def test_radius_that_leaves_nothing_of_an_update_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="noise multiplier"):
        add_noise(np.zeros(100, np.float32), msgspec.structs.replace(NOISE, radius=6), SEED)


def test_keys_of_a_round_are_bound_to_its_noise() -> None:
    others = [msgspec.structs.replace(NOISE, **{name: 5}) for name in NoiseTerms.__struct_fields__]
    terms = [msgspec.structs.replace(TERMS, noise=noise) for noise in (None, NOISE, *others)]
    contexts = {context_of("t", "f", "run", 1, each) for each in terms}
    assert len(contexts) == len(terms)


@pytest.mark.parametrize(
    "changes",
    [{"ring": "ring16", "value_bits": 13}, {"members": 3, "noise": msgspec.structs.replace(NOISE, quorum=4)}],
)
def test_noise_that_does_not_fit_its_round_is_refused(changes: dict[str, object]) -> None:
    terms = msgspec.structs.replace(TERMS, **{"noise": NOISE, **changes})
    with pytest.raises(MessageError, match="noise"):
        ring_of(terms)


def test_order_without_noise_is_the_one_that_older_devices_know() -> None:
    order = Order(
        order_id=bytes(16),
        kind="train",
        run="run",
        round_number=1,
        head_sha256=bytes(32),
        deadline=0.0,
        slot_bytes=0,
        masking=TERMS,
    )
    assert b"noise" not in encode_body(order)
    noisy = msgspec.structs.replace(order, masking=msgspec.structs.replace(TERMS, noise=NOISE))
    assert decode_body(encode_body(noisy), Order) == noisy
