"""The robust rules: exact against plain definitions, unmoved by what a minority sends, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cloud_server.aggregate.clipping import clip_factors
from cloud_server.aggregate.coordinate import coordinate_median, trimmed_mean
from cloud_server.aggregate.geometric_median import geometric_median
from cloud_server.aggregate.gram import gram_matrix, squared_distances, weighted_mean
from cloud_server.aggregate.krum import multi_krum
from cloud_server.aggregate.rows import MAX_ROWS, bucket_count, gather_rows
from cloud_server.aggregate.sorting_network import comparators, mean_of_ranks
from wire.errors import ConfigurationError, RoundError, UpdateError

CPU = torch.device("cpu")
HONEST, FALSE, SIZE = 13, 4, 300
TRUTH = np.random.default_rng(7).normal(0, 1, SIZE).astype(np.float32)


def matrix_of(rows: int, size: int = SIZE, seed: int = 3) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(0, 1, (rows, size)).astype(np.float32)
    return torch.from_numpy(values)


def cohort(attack: str) -> torch.Tensor:
    """Honest updates around TRUTH, and a quarter of the cohort that attacks."""
    rng = np.random.default_rng(11)
    honest = (TRUTH + 0.3 * rng.normal(0, 1, (HONEST, SIZE))).astype(np.float32)
    attacks: dict[str, NDArray[np.float32]] = {
        "boosted": np.float32(-100.0) * honest[:FALSE],
        "far": np.full((FALSE, SIZE), 1e6, np.float32),
        "huge": np.full((FALSE, SIZE), 1e30, np.float32),
        "noise": rng.normal(0, 50, (FALSE, SIZE)).astype(np.float32),
    }
    return torch.from_numpy(np.vstack([honest, attacks[attack]]).astype(np.float32))


def distance(update: torch.Tensor) -> float:
    """To the honest direction, in lengths of it."""
    return float(np.linalg.norm(update.numpy().astype(np.float64) - TRUTH) / np.linalg.norm(TRUTH))


# ---- order statistics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 31, 64])
def test_network_sorts_every_sequence_of_zeros_and_ones(rows: int) -> None:
    """A network that sorts all of them sorts everything (Knuth, the zero-one principle); many are drawn here."""
    rng = np.random.default_rng(rows)
    thresholds = np.arange(rows + 1)[:, None] / rows
    bits = np.concatenate([rng.random((rows + 1, rows)) < thresholds for _ in range(200)]).T
    values = torch.from_numpy(bits.astype(np.float32))
    for rank in range(rows):
        expected = np.sort(bits, axis=0)[rank].astype(np.float32)
        np.testing.assert_array_equal(mean_of_ranks(values, [rank]).numpy(), expected)


def test_network_leaves_out_what_no_wanted_rank_needs() -> None:
    assert len(comparators(32, frozenset({0}))) < len(comparators(32, frozenset(range(32)))) / 4


@pytest.mark.parametrize("rows", [1, 2, 7, 10, 33])
def test_median_is_that_of_numpy(rows: int) -> None:
    matrix = matrix_of(rows, 40_000)
    np.testing.assert_allclose(
        coordinate_median(matrix).numpy(), np.median(matrix.numpy(), axis=0), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    ("rows", "share", "cut"), [(10, 0.2, 2), (15, 0.2, 3), (100, 0.29, 29), (3, 0.49, 1), (2, 0.4, 0)]
)
def test_trimmed_mean_leaves_out_the_share_on_both_sides(rows: int, share: float, cut: int) -> None:
    matrix = matrix_of(rows)
    middle = np.sort(matrix.numpy(), axis=0)[cut : rows - cut]
    np.testing.assert_allclose(trimmed_mean(matrix, share).numpy(), middle.mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [-0.1, 0.5, 1.0, float("nan")])
def test_trimmed_mean_of_nothing_is_refused(share: float) -> None:
    with pytest.raises(ConfigurationError, match="trimmed share"):
        trimmed_mean(matrix_of(4), share)


# ---- distances ---------------------------------------------------------------------------------------------


def test_gram_matrix_gives_distances() -> None:
    matrix = matrix_of(9, 70_000)
    expected = ((matrix.double()[:, None, :100] - matrix.double()[None, :, :100]) ** 2).sum(-1)
    found = squared_distances(gram_matrix(matrix[:, :100]))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(
        gram_matrix(matrix), matrix.double() @ matrix.double().T, rtol=1e-12, atol=1e-8
    )


def test_geometric_median_has_a_smaller_sum_of_distances_than_all_around_it() -> None:
    matrix = matrix_of(11, 5).double()

    def total(point: torch.Tensor) -> float:
        return float((matrix - point).norm(dim=1).sum())

    median = geometric_median(matrix.float()).double()
    steps = torch.eye(5, dtype=torch.float64) * 1e-3
    assert all(total(median) < total(median + sign * step) for step in steps for sign in (1.0, -1.0))


def test_geometric_median_of_equal_rows_is_that_row() -> None:
    matrix = torch.from_numpy(np.vstack([TRUTH] * 5))
    np.testing.assert_allclose(geometric_median(matrix).numpy(), TRUTH, rtol=1e-6)


def test_geometric_median_where_most_rows_are_zero_is_zero() -> None:
    matrix = torch.zeros(5, SIZE)
    matrix[:2] = torch.from_numpy(TRUTH)
    assert not geometric_median(matrix).any()


def test_multi_krum_averages_the_rows_with_the_closest_neighbours() -> None:
    matrix = cohort("far")
    np.testing.assert_allclose(
        multi_krum(matrix, FALSE, selected=1).numpy(), _krum_by_definition(matrix.numpy(), FALSE), rtol=1e-6
    )


def _krum_by_definition(rows: NDArray[np.float32], attackers: int) -> NDArray[np.float32]:
    scores = []
    for i, row in enumerate(rows.astype(np.float64)):
        others = np.delete(rows.astype(np.float64), i, axis=0)
        nearest = np.sort(((others - row) ** 2).sum(axis=1))[: len(rows) - attackers - 2]
        scores.append(nearest.sum())
    best: NDArray[np.float32] = rows[int(np.argmin(scores))]
    return best


def test_multi_krum_with_too_few_rows_is_a_failed_round() -> None:
    with pytest.raises(RoundError, match="needs more than 8 updates, there are 8"):
        multi_krum(matrix_of(8), 3)


# ---- what a minority can do --------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["boosted", "far", "huge", "noise"])
@pytest.mark.parametrize("rule", ["median", "trimmed", "geometric", "krum"])
def test_a_quarter_of_false_rows_does_not_move_the_aggregate(rule: str, attack: str) -> None:
    matrix = cohort(attack)
    update = {
        "median": lambda: coordinate_median(matrix),
        "trimmed": lambda: trimmed_mean(matrix, 0.3),
        "geometric": lambda: geometric_median(matrix),
        "krum": lambda: multi_krum(matrix, FALSE),
    }[rule]()
    mean = matrix.double().mean(dim=0)
    assert distance(update) < 0.35
    assert distance(mean) > 5.0


def test_clipping_makes_long_updates_as_long_as_the_median() -> None:
    assert clip_factors([1.0, 2.0, 3.0, 400.0, 5.0]) == [1.0, 1.0, 1.0, 3.0 / 400.0, 3.0 / 5.0]


def test_clipping_ignores_devices_that_send_zeros() -> None:
    assert clip_factors([0.0, 0.0, 0.0, 2.0]) == [1.0] * 4
    assert clip_factors([0.0, 0.0]) == [1.0, 1.0]


# ---- buckets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("replies", "rows"), [(1, 1), (64, 64), (65, 33), (128, 64), (129, 43), (1000, 63)])
def test_buckets_are_the_most_that_fit(replies: int, rows: int) -> None:
    assert bucket_count(replies) == rows <= MAX_ROWS


def test_bucket_means_weigh_every_reply() -> None:
    vectors = matrix_of(130, 50).numpy()
    rows = gather_rows(iter(vectors), 130, 50, device=CPU, seed=1)
    sizes = np.bincount(np.arange(130) % len(rows))
    found = weighted_mean(rows, torch.from_numpy(sizes.astype(np.float64)))
    np.testing.assert_allclose(found.numpy(), vectors.mean(axis=0), rtol=1e-4, atol=1e-6)


def test_buckets_follow_from_the_seed() -> None:
    vectors = matrix_of(100, 20).numpy()
    first, again, other = (gather_rows(iter(vectors), 100, 20, device=CPU, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_up_to_sixty_four_replies_are_rows_as_they_came() -> None:
    vectors = matrix_of(64, 20).numpy()
    np.testing.assert_array_equal(gather_rows(iter(vectors), 64, 20, device=CPU, seed=9).numpy(), vectors)


@pytest.mark.parametrize(
    "vectors",
    [
        [],
        [np.zeros(5, np.float32)] * 3,
        [np.zeros(5, np.float32)],
        [np.zeros(4, np.float32)] * 2,
        [np.zeros(5)] * 2,
    ],
    ids=["none", "one too many", "one too few", "short", "float64"],
)
def test_vectors_that_do_not_fit_are_refused(vectors: list[NDArray[np.float32]]) -> None:
    with pytest.raises(UpdateError):
        gather_rows(iter(vectors), 2 if vectors else 0, 5, device=CPU, seed=0)
