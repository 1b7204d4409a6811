"""Updates kept between screening and fold: inside a budget, each given out once, and never what a fold depends on."""

from __future__ import annotations

import numpy as np

from cloud_server.rounds.kept import KeptUpdates
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.runner import RoundRunner
from cloud_server.screening import Screened
from tests.cloud.round_lab import Lab


def screened(size: int = 10, value: float = 1.0) -> Screened:
    return Screened(np.full(size, value, np.float32), np.zeros(0, np.float32), 5, 1.0)


def test_update_is_given_out_once() -> None:
    kept = KeptUpdates()
    one = screened()
    kept.put(b"a", one)
    assert kept.take(b"b") is None
    assert kept.take(b"a") is one
    assert kept.take(b"a") is None


def test_what_does_not_fit_is_not_kept_until_there_is_room() -> None:
    kept = KeptUpdates(limit_bytes=100)
    for name in (b"a", b"b", b"c"):
        kept.put(name, screened())
    assert [kept.take(name) is not None for name in (b"c", b"b")] == [False, True]
    kept.put(b"c", screened())
    assert len(kept) == 2
    kept.clear()
    assert (len(kept), kept.take(b"a")) == (0, None)
    kept.put(b"d", screened(25))
    assert kept.take(b"d") is not None


def test_same_id_again_takes_no_more_room() -> None:
    kept = KeptUpdates(limit_bytes=80)
    kept.put(b"a", screened(value=1.0))
    kept.put(b"a", screened(value=2.0))
    kept.put(b"b", screened())
    first = kept.take(b"a")
    assert first is not None
    assert first.update[0] == 1.0
    assert kept.take(b"b") is not None


class Forgetful(RoundRunner):
    """A runner with no room for any decoded update."""

    def __init__(self, plan: RunPlan, ports: RunPorts) -> None:
        super().__init__(plan, ports)
        self._intake.kept = KeptUpdates(limit_bytes=0)


def test_fold_is_the_same_with_and_without_what_was_kept() -> None:
    usual, forgetful = Lab(5, rounds=2, buffers=3), Lab(5, rounds=2, buffers=3, make_runner=Forgetful)
    assert usual.run().sha256 == forgetful.run().sha256
    assert len(usual.runner._intake.kept) == len(forgetful.runner._intake.kept) == 0


def test_weight_is_the_committed_one_whatever_the_registry_says_later() -> None:
    """A cap that changes between receipt and fold must not make a restart fold to another head."""
    heads = set()
    for restarts in (False, True):
        lab = Lab(3, rounds=1)
        lab.runner.tick()
        lab.deliver()
        lab.max_examples = lambda device: 1  # type: ignore[method-assign]
        if restarts:
            lab.restart()
        heads.add(lab.run().sha256)
    assert len(heads) == 1
