"""What each action of the round machine does: commit first, send after, report back.

Laws of the file: nothing leaves before what it says is committed; nothing waits (what takes long is a call
to a port); no number that matters is kept only in memory, so a process may end between any two statements
and `restore` goes on. Source: docs/architecture.md (The aggregator).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from cloud_server.db import rounds as books
from cloud_server.rounds import events as ev
from cloud_server.rounds.draws import draw_seed
from cloud_server.rounds.intake import Intake
from cloud_server.rounds.orders import expected_reply, make_orders, merged_train, order_message, round_train
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.ports import Candidate, Decision, Measured, Plan, Vector
from cloud_server.rounds.replies import StoredReplies
from cloud_server.rounds.state import NEVER, Collection, Phase, RoundState, Standing
from cloud_server.screening import l2_norm
from wire.checkpoint import Checkpoint
from wire.errors import QuorumError, RoundError, StorageError
from wire.messages import BlobRef, Invitation, TrainConfig

_LOG = logging.getLogger(__name__)
_PHASES = {
    "training": Phase.TRAINING,
    "folding": Phase.FOLDING,
    "evaluating": Phase.EVALUATING,
    "deciding": Phase.DECIDING,
}


class Performer:
    """Does the actions of one run. Holds its head, and the round and orders under way."""

    def __init__(self, plan: RunPlan, ports: RunPorts, intake: Intake) -> None:
        self._plan = plan
        self._ports = ports
        self._intake = intake
        self._database = ports.database
        self._seed = 0
        self._head: Checkpoint | None = None
        self._round: books.RoundRow | None = None
        self._orders: dict[str, books.OrderRow] = {}
        self._folded: tuple[Checkpoint, Mapping[str, float]] | None = None
        self._decision = Decision()
        self._published: BlobRef | None = None
        self._last_number = 0
        self.metrics: Mapping[str, float] = {}
        self._performers: dict[type[ev.Action], Callable[[Any], ev.Event | None]] = {
            ev.OpenRound: self._open_round,
            ev.SendOrders: self._send_orders,
            ev.ResendOrder: self._resend_order,
            ev.CloseCollection: self._close_collection,
            ev.Fold: self._fold,
            ev.CommitFold: self._commit_fold,
            ev.SendEvaluateOrders: self._send_evaluate_orders,
            ev.Decide: self._decide,
            ev.CommitRound: self._commit_round,
            ev.FailRound: self._fail_round,
            ev.FinishRun: self._finish_run,
        }

    @property
    def head(self) -> Checkpoint:
        """The newest head.

        Raises:
            RoundError: (us) before `restore`.
        """
        if self._head is None:
            raise RoundError("the run was not resumed")
        return self._head

    def order_of(self, device: str) -> books.OrderRow | None:
        """The order of a device in the collection under way."""
        return self._orders.get(device)

    def perform(self, action: ev.Action) -> ev.Event | None:
        """Does one action; returns what it answers to the machine, if it answers."""
        return self._performers[type(action)](action)

    # ---- training ----

    def _open_round(self, action: ev.OpenRound) -> ev.Event:
        number, now = action.round_number, self._ports.clock.now()
        seed = draw_seed(self._seed, "round", number)
        devices = self._devices_by_node()
        try:
            plan = self._ports.strategy.plan_train(number, self.head, sorted(devices), seed)
        except QuorumError as error:
            return ev.RoundNotOpened(str(error))
        if not plan.node_ids:
            return ev.RoundNotOpened("the strategy asked nobody to train")
        train = merged_train(self._plan.train, plan.config, draw_seed(seed, "train"))
        row = books.RoundRow(
            number=number,
            state="training",
            base_sha256=self.head.sha256,
            deadline=now + self._plan.policy.round_seconds,
            config={"train": msgspec.to_builtins(train)},
            seed=seed,
            node_ids=plan.node_ids,
            started=now,
        )
        members = [(devices[node_id], node_id) for node_id in plan.node_ids]
        orders = make_orders(self._seed, number, "train", members, self.head.sha256, row.deadline)
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.insert_round(connection, self._plan.run, row)
            books.insert_orders(connection, self._plan.run, orders, now)
        self._round, self._last_number = row, number
        self._listen(orders, set())
        _LOG.info("round opened: run=%s round=%d cohort=%d", self._plan.run, number, len(orders))
        return ev.RoundOpened(tuple(order.device for order in orders), row.deadline)

    def _send_orders(self, action: ev.SendOrders) -> None:
        orders = [self._orders[device] for device in action.devices]
        if not orders:
            return
        self._invite(is_open=True, deadline=orders[0].deadline)
        for order in orders:
            self._send(order)

    def _resend_order(self, action: ev.ResendOrder) -> None:
        self._send(self._orders[action.device])

    def _close_collection(self, _action: ev.CloseCollection) -> None:
        row, now = self._open_row(), self._ports.clock.now()
        kind, state = ("train", "folding") if row.state == "training" else ("evaluate", "deciding")
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.expire_orders(connection, self._plan.run, row.number, kind, now)
            books.update_round(connection, self._plan.run, row.number, state=state)
        self._round = replace(row, state=state)
        self._intake.close()

    # ---- the fold ----

    def _fold(self, _action: ev.Fold) -> ev.Event:
        row, base, ports = self._open_row(), self.head, self._ports
        try:
            replies = self._stored_replies(row)
            seed = draw_seed(row.seed, "aggregate")
            folded = ports.strategy.aggregate_train(row.number, base, replies, seed)
            self._check_bound(base, folded.params)
            seed = draw_seed(row.seed, "finish")
            head = ports.finisher.finish(folded.params, folded.buffers, base, seed)
            head.check(self._plan.manifest)
            self._check_bound(base, head.params)
        except RoundError as error:
            return ev.FoldDone(str(error))
        self._folded = (head, {**folded.metrics, "train_devices": float(len(replies))})
        return ev.FoldDone()

    def _stored_replies(self, row: books.RoundRow) -> StoredReplies:
        with self._database.read() as connection:
            rows = books.load_updates(connection, self._plan.run, row.number, "train")
            orders = books.load_orders(connection, self._plan.run, row.number, "train")
        orders = [self._with_node(order) for order in orders]
        expected = {order.order_id: self._expected(order) for order in orders}
        node_ids = {order.device: order.node_id for order in orders}
        return StoredReplies(self._database, self._ports.blobs, rows, expected, node_ids)

    def _check_bound(self, base: Checkpoint, params: Vector) -> None:
        if not np.isfinite(params).all():
            raise RoundError("the aggregate is not finite")
        change, limit = l2_norm(params - base.params), self._plan.max_head_change
        if change > limit:
            raise RoundError(
                f"the head would move by {change:.3g} of {limit:.3g}", change=change, limit=limit
            )

    def _commit_fold(self, action: ev.CommitFold) -> None:
        if self._folded is None:
            raise RoundError("nothing was folded")
        row, now, run = self._open_row(), self._ports.clock.now(), self._plan.run
        head, metrics = self._folded
        state = "evaluating" if action.is_evaluated else "done"
        values = {"state": state, "head_sha256": head.sha256, "metrics": dict(metrics), "ended": now}
        self._ports.blobs.put_blob(head.to_bytes())
        with self._database.transaction(fence=self._ports.fence) as connection:
            large = _large(books.load_updates(connection, run, row.number, "train"))
            books.insert_head(connection, run, row.number, head.sha256, now)
            exported = self._ports.strategy.export_state()
            books.insert_strategy_state(connection, run, row.number, exported)
            books.end_updates(connection, run, row.number, "train", "folded")
            books.update_round(connection, run, row.number, **values)
        self._round = replace(row, state=state, head_sha256=head.sha256, metrics=metrics)
        self._head, self._folded, self._published, self._orders = head, None, None, {}
        self.metrics = metrics
        self._forget(large)
        _LOG.info("round folded: run=%s round=%d updates=%d", run, row.number, int(metrics["train_devices"]))

    # ---- evaluation and decision ----

    def _send_evaluate_orders(self, _action: ev.SendEvaluateOrders) -> ev.Event:
        row, now = self._open_row(), self._ports.clock.now()
        devices = self._devices_by_node()
        seed = draw_seed(row.seed, "evaluate")
        try:
            plan = self._ports.strategy.plan_evaluate(row.number, self.head, sorted(devices), seed)
        except QuorumError:
            plan = Plan((), {})
        deadline = now + self._plan.policy.evaluate_seconds
        members = [(devices[node_id], node_id) for node_id in plan.node_ids]
        orders = make_orders(self._seed, row.number, "evaluate", members, self.head.sha256, deadline)
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.insert_orders(connection, self._plan.run, orders, now)
        self._listen(orders, set())
        return ev.EvaluationOpened(tuple(order.device for order in orders), deadline)

    def _decide(self, _action: ev.Decide) -> ev.Event:
        row, ports = self._open_row(), self._ports
        with self._database.read() as connection:
            rows = books.load_updates(connection, self._plan.run, row.number, "evaluate")
        measured = [Measured(ports.nodes.node_id(r.device), r.num_examples, r.metrics) for r in rows]
        metrics = ports.strategy.aggregate_evaluate(row.number, measured) if measured else {}
        self._decision = ports.releaser.decide(
            Candidate(
                run=self._plan.run,
                round_number=row.number,
                checkpoint=self.head,
                metrics=metrics,
                devices=len(measured),
            )
        )
        self.metrics = {**row.metrics, **metrics, **self._decision.metrics}
        return ev.DecisionMade()

    def _commit_round(self, _action: ev.CommitRound) -> None:
        row, now, run = self._open_row(), self._ports.clock.now(), self._plan.run
        values = {
            "state": "done",
            "ended": now,
            "metrics": dict(self.metrics),
            "reason": self._decision.reason,
        }
        with self._database.transaction(fence=self._ports.fence) as connection:
            large = _large(books.load_updates(connection, run, row.number, "evaluate"))
            books.end_updates(connection, run, row.number, "evaluate", "folded")
            books.update_round(connection, run, row.number, **values)
        self._forget(large)
        version = self._decision.release_version
        said = f"release {version}" if version else self._decision.reason or "no evaluation"
        _LOG.info("round done: run=%s round=%d %s", run, row.number, said)
        self._end_round()

    # ---- other ends ----

    def _fail_round(self, action: ev.FailRound) -> None:
        row, now, run = self._open_row(), self._ports.clock.now(), self._plan.run
        with self._database.transaction(fence=self._ports.fence) as connection:
            large = _large(books.load_updates(connection, run, row.number, "train"))
            books.expire_orders(connection, run, row.number, "train", now)
            books.end_updates(connection, run, row.number, "train", "discarded", "round_failed")
            books.update_round(connection, run, row.number, state="failed", ended=now, reason=action.reason)
            state = books.load_strategy_state(connection, run)
        self._ports.strategy.import_state(state)
        self._forget(large)
        self._end_round()
        self._invite(is_open=False, deadline=0.0)
        _LOG.warning("round failed: run=%s round=%d reason=%s", run, row.number, action.reason)

    def _finish_run(self, _action: ev.FinishRun) -> None:
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.set_run_status(connection, self._plan.run, "finished")
        self._invite(is_open=False, deadline=0.0)
        _LOG.info("run finished: run=%s", self._plan.run)

    # ---- parts ----

    def _open_row(self) -> books.RoundRow:
        if self._round is None:
            raise RoundError("no round is open")
        return self._round

    def _end_round(self) -> None:
        self._round, self._orders, self._folded, self._decision = None, {}, None, Decision()
        self._intake.close()

    def _devices_by_node(self) -> dict[int, str]:
        return {node_id: device for device, node_id in self._ports.nodes.present().items()}

    def _with_node(self, order: books.OrderRow) -> books.OrderRow:
        return replace(order, node_id=self._ports.nodes.node_id(order.device))

    def _listen(self, orders: Sequence[books.OrderRow], answered: set[bytes]) -> None:
        self._orders = {order.device: order for order in orders}
        self._intake.open({order.order_id: self._expected(order) for order in orders}, answered)

    def _expected(self, order: books.OrderRow) -> Any:
        cap = self._ports.nodes.max_examples(order.device)
        return expected_reply(self._plan, order, self._train(), cap)

    def _train(self) -> TrainConfig:
        return self._plan.train if self._round is None else round_train(self._round)

    def _send(self, order: books.OrderRow) -> None:
        self._ports.outbox.send_order(order.device, order_message(self._plan, order, self._train()))

    def _invite(self, *, is_open: bool, deadline: float) -> None:
        if self._published is None:
            self._published = self._ports.outbox.publish_blob(self.head.to_bytes())
        self._ports.outbox.send_invitation(
            Invitation(
                run=self._plan.run,
                round_number=self._last_number,
                open=is_open,
                deadline=deadline,
                graphs_sha256=self._plan.graphs_sha256,
                head=self._published,
                train=self._train(),
            )
        )

    def _forget(self, keys: Iterable[str]) -> None:
        """After the commit; a blob that stays behind because the process ends here is only space."""
        for key in keys:
            self._ports.blobs.delete_blob(key)

    # ---- after a restart ----

    def restore(self, row: books.RunRow) -> RoundState:
        """Reads back where the run stands; the machine goes on from there.

        Raises:
            StorageError: (disk) the run has no head.
        """
        self._seed = row.seed
        with self._database.read() as connection:
            head = books.load_head(connection, row.run)
            rounds = books.load_rounds(connection, row.run)
            moved = books.count_moved(connection, row.run)
            self._ports.strategy.import_state(books.load_strategy_state(connection, row.run))
        if head is None:
            raise StorageError(f"the run {row.run} has no head", run=row.run)
        self._head = Checkpoint.from_bytes(self._ports.blobs.get_blob(head.hex()))
        last = rounds[-1] if rounds else None
        self._last_number = last.number if last else 0
        self.metrics = next((r.metrics for r in reversed(rounds) if r.head_sha256), {})
        failures = _failures(rounds)
        rest = self._plan.policy.backoff(failures - 1) if failures else 0.0
        state = RoundState(
            round_number=self._last_number,
            moved=moved,
            failures=failures,
            is_paused=row.status == "paused",
            not_before=rounds[-1].ended + rest if rounds else 0.0,
        )
        return self._restore_round(last, state) if last and last.state in _PHASES else state

    def _restore_round(self, row: books.RoundRow, state: RoundState) -> RoundState:
        self._round = row
        phase, run = _PHASES[row.state], self._plan.run
        state = replace(state, phase=phase)
        if phase not in (Phase.TRAINING, Phase.EVALUATING):
            return state
        kind = "train" if phase is Phase.TRAINING else "evaluate"
        with self._database.read() as connection:
            orders = books.load_orders(connection, run, row.number, kind)
            stored = {r.order_id for r in books.load_updates(connection, run, row.number, kind)}
            refused = {r.order_id for r in books.load_updates(connection, run, row.number, kind, "refused")}
        self._listen([self._with_node(order) for order in orders], stored)
        members = {order.device: _standing(order, stored, refused) for order in orders}
        deadline = orders[0].deadline if orders else NEVER
        return replace(state, cohort=Collection.of(members), deadline=deadline)


def _standing(order: books.OrderRow, stored: set[bytes], refused: set[bytes]) -> Standing:
    if order.order_id in stored:
        return Standing.ANSWERED
    if order.order_id in refused:
        return Standing.REFUSED
    return Standing.DECLINED if order.state == "declined" else Standing.WAITING


def _failures(rounds: Sequence[books.RoundRow]) -> int:
    """How many rounds failed since the last that did not."""
    count = 0
    for row in reversed(rounds):
        if row.state != "failed":
            break
        count += 1
    return count


def _large(rows: Iterable[books.UpdateRow]) -> list[str]:
    return [row.artefact_key for row in rows if row.artefact_key]
