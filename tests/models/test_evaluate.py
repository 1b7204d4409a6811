"""How well a score tells two kinds of samples apart, against a count of every pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.evaluate import area_under_curve
from wire.errors import DataError

scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=1, max_size=30)


@given(usual=scores, unusual=scores)
def test_area_under_the_curve_is_the_share_of_pairs_in_order(
    usual: list[float], unusual: list[float]
) -> None:
    pairs = [1.0 if b > a else 0.5 if a == b else 0.0 for a in usual for b in unusual]
    assert area_under_curve(np.array(usual), np.array(unusual)) == pytest.approx(np.mean(pairs))


def test_area_under_the_curve_without_scores_is_refused() -> None:
    with pytest.raises(DataError):
        area_under_curve(np.zeros(0), np.ones(3))
