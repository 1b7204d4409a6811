"""What is drawn follows from the seed alone, is spread evenly, and needs no `numpy.random`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent.rounds.draws import Draws
from wire.codec import Randomness, decode, encode

ROOT = Path(__file__).resolve().parents[2]


def test_same_seed_draws_the_same_and_another_seed_or_call_does_not() -> None:
    first, second, other = Draws(5), Draws(5), Draws(6)
    drawn = [first.bytes(16) for _ in range(3)]
    assert drawn == [second.bytes(16) for _ in range(3)]
    assert len({*drawn, *(other.bytes(16) for _ in range(3))}) == 6


def test_draws_are_the_same_on_every_machine() -> None:
    draws = Draws(2**63 + 1)
    assert draws.bytes(4).hex() == "8d4a4e9f"
    assert draws.permutation(8).tolist() == [1, 5, 6, 3, 4, 2, 0, 7]


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_permutation_holds_every_number_once(count: int) -> None:
    order = Draws(1).permutation(count)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_permutations_put_every_number_in_every_place_alike() -> None:
    draws = Draws(2)
    orders = np.stack([draws.permutation(6) for _ in range(6000)])
    counts = np.stack([np.bincount(column, minlength=6) for column in orders.T])
    # 36 counts of a mean of 1,000 and a deviation of 29: five deviations.
    assert np.abs(counts - 1000).max() < 145


@pytest.mark.parametrize("codec", ["int4", "int8", "dithered"])
def test_codecs_take_draws_where_they_take_a_generator_of_numpy(codec: str) -> None:
    vector = np.linspace(-1, 1, 4096).astype(np.float32)
    sources: list[Randomness] = [Draws(3), np.random.default_rng(3)]
    errors = [np.abs(decode(encode(vector, codec, source), codec, 4096) - vector) for source in sources]
    assert errors[0].max() < 0.5
    assert errors[0].mean() == pytest.approx(errors[1].mean(), rel=0.1)


def test_planning_and_encoding_import_no_numpy_random() -> None:
    code = (
        "import sys, numpy as np\n"
        "from edge_agent.rounds.jobs import _encode\n"
        "from edge_agent.rounds.learning import plan_batches\n"
        "from wire.messages import TrainConfig\n"
        "plan_batches(20, TrainConfig(), 1)\n"
        "for codec in ('dithered', 'int4', 'int2'):\n"
        "    _encode(np.ones(600, np.float32), TrainConfig(codec=codec), 1, None)\n"
        "print('numpy.random' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
