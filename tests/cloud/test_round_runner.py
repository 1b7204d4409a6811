"""Whole runs on a virtual clock: rounds fold, restarts change nothing, bad replies end nothing."""

from __future__ import annotations

import numpy as np

from cloud_server.db import schema
from tests.cloud.round_lab import Lab
from wire.codec import decode


def test_run_of_two_rounds_folds_the_exact_weighted_mean() -> None:
    lab = Lab(4, rounds=1)
    base = lab.initial.params
    head = lab.run()
    orders = {name: order for name, order in lab.orders if order.kind == "train"}
    updates = [lab.devices[name].update(order) for name, order in orders.items()]
    vectors = np.stack([decode(u.payload, u.codec, u.params_size) for u in updates]).astype(np.float64)
    weights = np.array([u.num_examples for u in updates], np.float64)
    expected = base + (weights[:, None] * vectors).sum(0) / weights.sum()
    np.testing.assert_allclose(head.params, expected, rtol=0, atol=1e-7)
    assert {row.state for row in lab.rows(schema.updates)} == {"folded"}
