"""The comparison with Flower's own deployment, end to end with real processes; and the model that both sides share."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import flower
from bench.flower_deployment import FlowerDeployment, Mark
from fleet.processes import family


@pytest.mark.parametrize(("size", "params"), list(zip(flower.SIZES, (5_000, 2_500_000), strict=True)))
def test_models_have_the_size_that_they_are_called_by(size: flower.Size, params: int) -> None:
    assert size.params == params


def test_every_row_compares_flower_with_shoal() -> None:
    size = flower.SIZES[1]
    slow = flower.Cost(20.0, 24.0, 50e6)
    ours = flower.Cost(1.0, 1.5, 12e6, update_bytes=525_000)
    rows = flower.compare_costs(10, size, 3, slow, ours)
    assert [row.value for row in rows] == pytest.approx([20.0, 16.0, 50 / 12, 0.0525])
    assert [row.is_met for row in rows] == [True, True, None, True]


@pytest.mark.slow
def test_flower_deployment_runs_the_app_and_leaves_no_process(tmp_path: Path) -> None:
    marks: list[Mark] = []
    with FlowerDeployment(tmp_path / "flower", 2) as deployment:
        deployment.run(5_000, 1, marks.append)
        members = family(deployment.process_ids)
    assert [(mark.what, mark.round, mark.messages) for mark in marks] == [("begin", 1, 2), ("end", 1, 2)]
    assert len(members) > 3
    assert not [member for member in members if Path(f"/proc/{member}/exe").exists()]


@pytest.mark.slow
def test_comparison_of_two_nodes_has_all_rows() -> None:
    rows = flower.measure((2,), flower.SIZES[:1], rounds=1)
    assert len(rows) == 4
    assert all(row.value > 0.0 and not row.goal for row in rows)
