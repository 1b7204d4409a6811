"""A run with two servers on the real runner, database, strategy and helper: exact means, and whatever goes wrong."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_server.db import schema
from cloud_server.db.incarnation import reincarnate
from cloud_server.helper.helper import Helper
from cloud_server.helper.store import HelperStore
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.runner import RoundRunner
from cloud_server.rounds.state import Phase
from cloud_server.secure.helped import UNUSABLE, HelpedPerformer, HelpedPorts
from edge_agent.rounds.draws import Draws
from edge_agent.rounds.helped_round import HelpedMasking
from tests.cloud.helper_lab import Sealer
from tests.cloud.round_lab import BlownFuseError, Device, Fuse, Lab, Message
from wire.helper import HelperAnswer, HelperRefusal
from wire.messages import Join, Order, TrainConfig, Update, decode_body
from wire.primitives import KemPrivateKey, KemPublicKey, SigningKey
from wire.ring import decode_mean, encode_ring, ring_of

DEVICES = 6


def key_of(name: str) -> SigningKey:
    return SigningKey(hashlib.sha256(name.encode()).digest())


class HelpedRun(Lab):
    """The lab with a helper, which is another process: it stays when the aggregator ends.

    Attributes:
        is_reachable: whether questions reach the helper.
        unrostered: devices that the helper does not know; `unsealing` send something else than a seed.
    """

    def __init__(self, path: Path, devices: int = DEVICES, *, min_devices: int = 3, **options: Any) -> None:
        self.kem = KemPrivateKey.from_bytes("x25519", b"h" * 32)
        self.messages: deque[tuple[str, Order]] = deque()
        self.masked: dict[tuple[str, bytes], Message] = {}
        self.is_reachable = True
        self.unsealing: set[str] = set()
        self.questions: list[bytes] = []
        self.said: dict[bytes, HelperAnswer | HelperRefusal] = {}
        self.store = HelperStore(path)
        options.setdefault("train", TrainConfig(codec="int8", clipping_norm=5.0))
        super().__init__(devices, make_runner=self._helped_runner, secure="two_server", **options)
        self.store.add([(name, key_of(name).public_bytes) for name in self.devices], 0.0)
        self.helper = Helper(
            self.store, self.kem, tenant="t", fleet="f", min_devices=min_devices, clock=self.clock
        )

    def _helped_runner(self, plan: RunPlan, ports: RunPorts) -> RoundRunner:
        helped = HelpedPorts(tenant="t", fleet="f", helper=self)
        return RoundRunner(plan, ports, make_desk=lambda *parts: HelpedPerformer(*parts, helped=helped))

    # ---- the helper, as the aggregator sees it ----

    @property
    def key(self) -> KemPublicKey:
        return self.kem.public_key

    def ask(self, question: bytes, total_bytes: int) -> None:
        self.fuse.burn("before question")
        self.questions.append(question)
        if self.is_reachable:
            self.said[question] = self.helper.answer(question)
            self.fuse.burn("after answer")

    def take(self, question: bytes) -> HelperAnswer | HelperRefusal | None:
        return self.said.pop(question, None)

    # ---- devices ----

    def send_order(self, device: str, order: Order) -> None:
        super().send_order(device, order)
        self.inbox.clear()
        self.messages.append((device, order))

    def deliver(self) -> None:
        while self.messages:
            name, order = self.messages[0]
            if name not in self.absent:
                self.hear(name, order)
            self.messages.popleft()

    def hear(self, name: str, order: Order) -> None:
        if order.kind == "evaluate":
            answer = self.devices[name].answer(order)
            assert answer is not None
            self.feed(name, order, answer)
            return
        self.runner.on_join(name, Join(order_id=order.order_id, accepted=True))
        if (name, order.order_id) not in self.masked:
            self.masked[name, order.order_id] = self.message(self.devices[name], order)
        self.send_up(name, self.masked[name, order.order_id])

    def message(self, device: Device, order: Order) -> Message:
        masking = HelpedMasking(
            order, tenant="t", fleet="f", helper=lambda: self.kem.public_key,
            random=random.Random(f"{device.name} {order.round_number}").randbytes,
            min_devices=3, seal=Sealer(device.name, key_of(device.name)),
        )  # fmt: skip
        masked, sealed = masking.mask(self.encoded(device.name, order))
        update = device.update(
            order,
            num_examples=1,
            codec=masking.ring.name,
            payload=masked.tobytes(),
            buffers=b"",
            metrics={},
            sealed_seed=b"nonsense" if device.name in self.unsealing else sealed,
        )
        return device.message(update, order)

    def encoded(self, name: str, order: Order) -> NDArray[Any]:
        assert order.helped is not None
        vector = self.devices[name].local_update(order)
        limit = self.plan.train.clipping_norm
        clipped = (vector * min(1.0, limit / float(np.linalg.norm(vector)))).astype(np.float32)
        return encode_ring(clipped, ring_of(order.helped), Draws(order.round_number))

    def step(self) -> None:
        self.runner.tick()
        if self.messages:
            self.deliver()
        elif not self.runner.is_finished:
            self.clock.time = max(self.clock.time, min(self.runner.next_tick, self.clock.time + 3600))

    def until(self, state: str) -> None:
        """Plays until the newest round is in a state."""
        for _ in range(200):
            if self.states() and self.states()[-1] == state:
                return
            self.step()
        raise AssertionError(f"never {state}: {self.states()}")

    def train_order(self, number: int = 1) -> Order:
        return next(o for _, o in self.orders if o.kind == "train" and o.round_number == number)

    def mean_of(self, names: list[str], order: Order) -> NDArray[np.float32]:
        assert order.helped is not None
        ring = ring_of(order.helped)
        total = np.zeros(self.plan.manifest.params_size, ring.dtype)
        for name in names:
            total += self.encoded(name, order)
        return decode_mean(total, ring, len(names))

    def states(self) -> list[str]:
        return [row.state for row in self.rows(schema.rounds)]

    def updates(self) -> dict[str, tuple[str, str]]:
        """State and reason of each device's newest update."""
        return {
            row.device: (row.state, row.reason) for row in self.rows(schema.updates) if row.kind == "train"
        }


def test_helped_round_moves_the_head_by_the_exact_mean(tmp_path: Path) -> None:
    lab = HelpedRun(tmp_path / "h.db", rounds=2)
    head = lab.run()
    base = lab.initial.params + lab.mean_of(sorted(lab.devices), lab.train_order(1))
    assert np.array_equal(head.params, base + lab.mean_of(sorted(lab.devices), lab.train_order(2)))
    assert lab.states() == ["done", "done"]
    assert lab.store.summary()[0] == 2


def test_what_the_aggregator_keeps_says_nothing_by_itself(tmp_path: Path) -> None:
    lab = HelpedRun(tmp_path / "h.db", rounds=1)
    lab.run()
    order = lab.train_order()
    for (name, _), message in lab.masked.items():
        plain = lab.encoded(name, order).tobytes()
        assert len(message.body) > len(plain)
        assert plain not in message.body
        assert decode_body(message.body, Update).sealed_seed


def test_devices_that_never_answer_are_not_in_the_question(tmp_path: Path) -> None:
    lab = HelpedRun(tmp_path / "h.db", rounds=1, round_seconds=30.0)
    lab.runner.tick()
    lab.absent = {"d01", "d04"}
    head = lab.run()
    left = sorted(set(lab.devices) - lab.absent)
    assert np.array_equal(head.params, lab.initial.params + lab.mean_of(left, lab.train_order()))


def test_devices_may_all_be_gone_when_the_helper_is_asked(tmp_path: Path) -> None:
    lab = HelpedRun(tmp_path / "h.db", rounds=1, evaluate_every=0, mask_seconds=300.0)
    lab.is_reachable = False
    lab.until("asking")
    for name in list(lab.devices):
        lab.leave(name)
    lab.step()
    assert lab.runner.phase is Phase.ASKING
    lab.is_reachable = True
    assert np.array_equal(
        lab.run().params, lab.initial.params + lab.mean_of(sorted(lab.devices), lab.train_order())
    )


def test_seed_that_cannot_be_summed_leaves_its_device_out(tmp_path: Path) -> None:
    lab = HelpedRun(tmp_path / "h.db", rounds=1)
    lab.unsealing = {"d02"}
    head = lab.run()
    left = sorted(set(lab.devices) - {"d02"})
    assert np.array_equal(head.params, lab.initial.params + lab.mean_of(left, lab.train_order()))
    assert lab.updates()["d02"] == ("discarded", UNUSABLE)
    assert {lab.updates()[name][0] for name in left} == {"folded"}


def test_invented_devices_give_the_aggregator_nothing(tmp_path: Path) -> None:
    """Two devices of the helper's roster, the others approved by the aggregator alone: no sum is told."""
    lab = HelpedRun(tmp_path / "h.db", rounds=1)
    for name in sorted(lab.devices)[2:]:
        assert lab.store.remove(name)
    lab.until("failed")
    assert lab.runner.head.sha256 == lab.initial.sha256
    assert lab.store.summary()[0] == 0
    assert "too_few" in lab.rows(schema.rounds)[0].reason


def test_helper_that_cannot_be_reached_fails_the_round_and_not_the_run(tmp_path: Path) -> None:
    lab = HelpedRun(tmp_path / "h.db", rounds=1, mask_seconds=70.0, resend_seconds=30.0)
    lab.is_reachable = False
    lab.until("failed")
    assert len(lab.questions) == 3
    assert len(set(lab.questions)) == 1
    assert lab.runner.head.sha256 == lab.initial.sha256
    lab.is_reachable = True
    lab.run()
    assert lab.states()[-1] == "done"


def test_helper_that_comes_back_in_time_is_asked_the_same(tmp_path: Path) -> None:
    lab = HelpedRun(tmp_path / "h.db", rounds=1, mask_seconds=300.0)
    lab.is_reachable = False
    lab.until("asking")
    lab.step()
    lab.is_reachable = True
    lab.run()
    assert lab.states() == ["done"]
    assert len(set(lab.questions)) == 1 < len(lab.questions)


def test_round_of_too_few_fails_before_anybody_is_asked(tmp_path: Path) -> None:
    lab = HelpedRun(tmp_path / "h.db", rounds=1, quorum=3, round_seconds=30.0)
    lab.runner.tick()
    lab.absent = {"d00", "d01", "d02", "d03"}
    lab.until("failed")
    assert lab.questions == []


def test_round_without_any_update_asks_nobody(tmp_path: Path) -> None:
    lab = HelpedRun(tmp_path / "h.db", rounds=1, quorum=1, folds_always=True, round_seconds=30.0)
    lab.runner.tick()
    lab.absent = set(lab.devices)
    lab.until("failed")
    assert lab.questions == []
    assert "no update" in lab.rows(schema.rounds)[0].reason


def test_cohort_below_three_opens_no_round(tmp_path: Path) -> None:
    lab = HelpedRun(tmp_path / "h.db", devices=2, rounds=1)
    lab.runner.tick()
    assert lab.states() == []


def test_only_approved_devices_are_asked_and_counted(tmp_path: Path) -> None:
    """The cohort is of devices that are approved and here: whom the registry does not name is no member."""
    lab = HelpedRun(tmp_path / "h.db", rounds=1)
    lab.absent = {"d05"}
    lab.runner.on_nodes_changed()
    lab.run()
    assert {name for name, order in lab.orders if order.kind == "train"} == set(lab.devices) - {"d05"}
    assert lab.train_order().helped is not None
    assert lab.train_order().helped.members == 5  # type: ignore[union-attr]


def test_restored_cloud_is_answered_though_it_counts_rounds_again(tmp_path: Path) -> None:
    """The backup is from before round 1, which the helper has answered in the lost life."""
    lost = HelpedRun(tmp_path / "h.db", rounds=1)
    lost.run()
    lost.store.close()
    lab = HelpedRun(tmp_path / "h.db", rounds=1)
    with lab.database.transaction() as connection:
        reincarnate(connection, lab.clock.now())
    lab.run()
    assert lab.states() == ["done"]
    assert lab.store.summary()[0] == 2


@pytest.mark.parametrize("stage", ["before question", "after answer"])
def test_restart_around_the_answer_gives_the_same_head(tmp_path: Path, stage: str) -> None:
    wanted = HelpedRun(tmp_path / "straight.db", rounds=1).run()
    lab = HelpedRun(tmp_path / "h.db", rounds=1)
    straight = HelpedRun(tmp_path / "probe.db", rounds=1)
    straight.fuse = straight.database.fuse = Fuse()
    straight.run()
    lab.fuse = lab.database.fuse = Fuse(straight.fuse.steps.index(stage))
    with pytest.raises(BlownFuseError):
        lab.run()
    lab.fuse = lab.database.fuse = Fuse()
    lab.said.clear()
    lab.restart()
    assert lab.runner.phase is Phase.ASKING
    assert lab.run().sha256 == wanted.sha256
    assert lab.states() == ["done"]


@pytest.mark.slow
def test_helped_round_comes_out_the_same_wherever_the_process_ends(tmp_path: Path) -> None:
    straight = HelpedRun(tmp_path / "straight.db", rounds=1)
    straight.unsealing = {"d01"}
    straight.fuse = straight.database.fuse = Fuse()
    wanted = straight.run()
    steps = len(straight.fuse.steps)
    assert steps > 20
    for at in range(0, steps, 2):
        lab = HelpedRun(tmp_path / f"{at}.db", rounds=1)
        lab.unsealing = {"d01"}
        lab.fuse = lab.database.fuse = Fuse(at)
        with pytest.raises(BlownFuseError):
            lab.run()
        lab.fuse = lab.database.fuse = Fuse()
        lab.said.clear()
        lab.restart()
        lab.run()
        assert lab.runner.head.sha256 == wanted.sha256, straight.fuse.steps[at]
        assert lab.states() == ["done"]
