"""The benchmark of the GPU, small and on the CPU: it measures the aggregator's own parts and says where."""

from __future__ import annotations

import torch

from bench.gpu import CLASSES, Network, Work, measure

TINY = Work(params=2000, updates=3, width=4, image=8, batch_size=4, samples=10)


def test_measurement_on_the_cpu_says_that_it_is_small() -> None:
    rows = measure(torch.device("cpu"), TINY)
    assert [row.name for row in rows] == [
        "streamed fold, float64 sum, CPU",
        "streamed fold, float32 sum, CPU",
        "refinement on CPU: bf16 / float32",
    ]
    assert all(row.value > 0.0 and "no CUDA device" in row.note and not row.goal for row in rows)


def test_network_answers_with_a_logit_for_each_class() -> None:
    assert Network(4)(torch.zeros(2, 3, 8, 8)).shape == (2, CLASSES)
