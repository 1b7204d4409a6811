"""What each action of the round machine does: commit first, send after, report back.

Laws of the file: nothing leaves before what it says is committed; nothing waits (what takes long is a call
to a port); no number that matters is kept only in memory, so a process may end between any two statements
and `restore` goes on. Source: docs/architecture.md (The aggregator).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import msgspec
import numpy as np

from cloud_server.db import rounds as books
from cloud_server.db.engine import Connection
from cloud_server.privacy.budget import EXHAUSTED
from cloud_server.rounds import events as ev
from cloud_server.rounds.chronicle import ROUND_FAILED, ROUND_FOLDED, note_round
from cloud_server.rounds.desk import Desk
from cloud_server.rounds.draws import draw_seed
from cloud_server.rounds.head_step import StepTaken, take_step
from cloud_server.rounds.intake import Intake
from cloud_server.rounds.orders import make_orders, merged_train
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.ports import Aggregate, Candidate, Decision, Measured, Plan, Vector
from cloud_server.rounds.state import COLLECTING, Phase, RoundState
from process.logs import get_logger
from wire.checkpoint import Checkpoint
from wire.errors import BudgetError, ModelError, PeerError, QuorumError, RoundError
from wire.norm import l2_norm

_log = get_logger("cloud.rounds")
_PHASES = {
    "training": Phase.TRAINING,
    "folding": Phase.FOLDING,
    "evaluating": Phase.EVALUATING,
    "deciding": Phase.DECIDING,
}


class Performer(Desk):
    """Drives a run by a strategy."""

    _opening_state: ClassVar = "training"
    _phases: ClassVar = _PHASES

    def __init__(self, plan: RunPlan, ports: RunPorts, intake: Intake) -> None:
        super().__init__(plan, ports, intake)
        self._folded: tuple[StepTaken, Mapping[str, float]] | None = None
        self._decision = Decision()
        self._performers |= {
            ev.OpenRound: self._open_round,
            ev.Fold: self._fold,
            ev.CommitFold: self._commit_fold,
            ev.SendEvaluateOrders: self._send_evaluate_orders,
            ev.Decide: self._decide,
            ev.CommitRound: self._commit_round,
            ev.FailRound: self._fail_round,
        }

    # ---- training ----

    def _open_round(self, action: ev.OpenRound) -> ev.Event:
        number, now = action.round_number, self._ports.clock.now()
        seed = draw_seed(self._seed, "round", number)
        devices, budget = self._devices_by_node(), self._ports.budget
        try:
            if budget is not None:
                budget.prepare(number, len(devices))
            plan = self._ports.strategy.plan_train(number, self.head, sorted(devices), seed)
            members = self._free(plan, devices)
            terms = self._committed_terms(number, [device for device, _ in members])
        except BudgetError as error:
            _log.warning("privacy_budget_spent", reason=str(error), hint=error.hint)
            return ev.RunEnded(str(error))
        except QuorumError as error:
            return ev.RoundNotOpened(str(error))
        if not plan.node_ids and budget is None:
            return ev.RoundNotOpened("the strategy asked nobody to train")
        train = merged_train(self._plan.train, plan.config, draw_seed(seed, "train"))
        row = books.RoundRow(
            number=number,
            state=self._opening_state,
            base_sha256=self.head.sha256,
            deadline=now + self._plan.policy.round_seconds,
            config={
                "train": msgspec.to_builtins(train),
                **self._committed_norm(),
                **self._privacy(),
                **terms,
            },
            seed=seed,
            node_ids=plan.node_ids,
            started=now,
        )
        deadline = self._order_deadline(row)
        orders = make_orders(self._seed, number, "train", members, self.head.sha256, deadline)
        with self._database.transaction(fence=self._ports.fence) as connection:
            self._leave_buffer(connection, number)
            books.insert_round(connection, self._plan.run, row)
            books.insert_orders(connection, self._plan.run, orders, now)
            if budget is not None:
                budget.commit(connection, len(orders), now)
        self._round, self._last_number = row, number
        _log.info("round_opened", run=self._plan.run, round=number, cohort=len(orders))
        return self._opened(orders, row)

    def _free(self, plan: Plan, devices: Mapping[int, str]) -> list[tuple[str, int]]:
        """(device, node id) of everybody who was drawn."""
        return [(devices[node_id], node_id) for node_id in plan.node_ids]

    def _order_deadline(self, row: books.RoundRow) -> float:
        """Until when a device may work on an order of a round."""
        return row.deadline

    def _leave_buffer(self, connection: Connection, number: int) -> None:
        """What a buffered run, before the settings said otherwise, stored for this round is on no base of it."""
        books.end_updates(connection, self._plan.run, number, "train", "discarded", "not_buffered")

    def _opened(self, orders: Sequence[books.OrderRow], row: books.RoundRow) -> ev.Event:
        """After the commit: the round collects."""
        self._listen(orders, set())
        return ev.RoundOpened(tuple(order.device for order in orders), row.deadline)

    def _privacy(self) -> dict[str, str]:
        """That the round must have a charge; a part of its configuration, which outlives a ledger that was cut."""
        budget = self._ports.budget
        return {} if budget is None else {"privacy": budget.plan.mode}

    def _committed_terms(self, number: int, devices: Sequence[str]) -> dict[str, Any]:
        """What else the devices of a round are told and committed to; a part of its configuration.

        Raises:
            QuorumError: no round can be opened with these devices.
        """
        return {}

    # ---- the fold ----

    def _fold(self, _action: ev.Fold) -> ev.Event:
        row, base, ports = self._open_row(), self.head, self._ports
        try:
            if "privacy" in row.config and ports.budget is None:
                raise RoundError("the round was opened under differential privacy, which is switched off now")
            replies = self._stored_replies(row)
            seed = draw_seed(row.seed, "aggregate")
            folded = ports.strategy.aggregate_train(row.number, base, replies, seed)
            self._check_bound(base, folded.params)
            step = self._take_step(row, base, folded)
            step.head.check(self._plan.manifest)
            self._check_bound(base, step.head.params)
            self._check_held_out(base, step.head)
        except (RoundError, ModelError, PeerError) as error:
            return ev.FoldDone(str(error))
        measured = {
            "train_devices": float(len(replies)),
            **self._measured_norm(row.number),
            **self._measured_staleness(row),
        }
        self._folded = (step, {**folded.metrics, **measured})
        return ev.FoldDone()

    def _measured_staleness(self, row: books.RoundRow) -> dict[str, float]:
        with self._database.read() as connection:
            stale = [origin.staleness for origin in self._origins(connection, row).values()]
        if not stale:
            return {}
        return {"staleness_mean": sum(stale) / len(stale), "staleness_max": float(max(stale))}

    def _take_step(self, row: books.RoundRow, base: Checkpoint, folded: Aggregate) -> StepTaken:
        finisher, buffers = self._ports.finisher, folded.buffers
        params = finisher.refine(folded.params, buffers, draw_seed(row.seed, "finish"))
        return take_step(
            base,
            params,
            self._step.residual,
            lambda vector: finisher.finish(vector, buffers, base),
            codec=self._plan.patch_codec,
            seed=draw_seed(row.seed, "patch"),
        )

    def _check_bound(self, base: Checkpoint, params: Vector) -> None:
        if not np.isfinite(params).all():
            raise RoundError("the aggregate is not finite")
        change, limit = l2_norm(params - base.params), self._plan.max_head_change
        if change > limit:
            raise RoundError(
                f"the head would move by {change:.3g} of {limit:.3g}", change=change, limit=limit
            )

    def _check_held_out(self, base: Checkpoint, head: Checkpoint) -> None:
        held_out, limit = self._ports.held_out, self._plan.max_holdout_drop
        if held_out is None:
            return
        loss = held_out.loss_of(base, head)
        if loss > limit:
            raise RoundError(
                f"the head would be worse by {loss:.3g} of {limit:.3g} on held-out data",
                loss=loss,
                limit=limit,
            )

    def _commit_fold(self, action: ev.CommitFold) -> None:
        if self._folded is None:
            raise RoundError("nothing was folded")
        row, now, run = self._open_row(), self._ports.clock.now(), self._plan.run
        step, metrics = self._folded
        state, head = "evaluating" if action.is_evaluated else "done", self._keep_step(row.number, step)
        values = {"state": state, "head_sha256": head.sha256, "metrics": dict(metrics), "ended": now}
        with self._database.transaction(fence=self._ports.fence) as connection:
            rows = books.load_updates(connection, run, row.number, "train")
            origins = self._origins(connection, row)
            books.insert_head(connection, run, head, now)
            outdated = books.forget_patches(connection, run, row.number)
            exported = self._ports.strategy.export_state()
            books.insert_strategy_state(connection, run, row.number, exported)
            books.end_updates(connection, run, row.number, "train", "folded")
            books.update_round(connection, run, row.number, **values)
            self._end_charge(connection, row.number)
            note_round(connection, ROUND_FOLDED, run, row, rows, now, origins, head=head.sha256.hex())
        self._round = replace(row, state=state, head_sha256=head.sha256, metrics=metrics)
        self._move_head(step, row.number)
        self._folded, self._orders = None, {}
        self._window.fill({})
        self.metrics = metrics
        self._forget([*(each.artefact_key for each in rows), *outdated])
        _log.info("round_folded", run=run, round=row.number, updates=int(metrics["train_devices"]))

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
        members = self._free(plan, devices)
        orders = make_orders(self._seed, row.number, "evaluate", members, self.head.sha256, deadline)
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.insert_orders(connection, self._plan.run, orders, now)
        self._listen(orders, set())
        return ev.EvaluationOpened(tuple(order.device for order in orders), deadline)

    def _decide(self, _action: ev.Decide) -> ev.Event:
        row, ports = self._open_row(), self._ports
        measured = self._measurements(row.number)
        metrics: Mapping[str, float] = {}
        try:
            if measured:
                metrics = ports.strategy.aggregate_evaluate(row.number, measured)
            self._decision = ports.releaser.decide(self._candidate(row, metrics, measured))
        except (RoundError, ModelError) as error:
            _log.warning("round_not_decided", run=self._plan.run, round=row.number, reason=str(error))
            self._decision = Decision(reason=f"not decided: {error}")
        self.metrics = {**row.metrics, **metrics, **self._decision.metrics}
        return ev.DecisionMade()

    def _candidate(
        self, row: books.RoundRow, metrics: Mapping[str, float], measured: Sequence[Measured]
    ) -> Candidate:
        return Candidate(
            run=self._plan.run,
            round_number=row.number,
            checkpoint=self.head,
            metrics=metrics,
            devices=len(measured),
            measured=measured,
        )

    def _commit_round(self, _action: ev.CommitRound) -> None:
        row, now, run = self._open_row(), self._ports.clock.now(), self._plan.run
        values = {
            "state": "done",
            "ended": now,
            "metrics": dict(self.metrics),
            "reason": self._decision.reason,
        }
        with self._database.transaction(fence=self._ports.fence) as connection:
            rows = books.load_updates(connection, run, row.number, "evaluate")
            books.end_updates(connection, run, row.number, "evaluate", "folded")
            books.update_round(connection, run, row.number, **values)
        self._forget(each.artefact_key for each in rows)
        said = {"release": self._decision.release_version, "held": self._decision.reason}
        _log.info("round_done", run=run, round=row.number, **said)
        self._end_round()

    # ---- other ends ----

    def _fail_round(self, action: ev.FailRound) -> None:
        row, now, run = self._open_row(), self._ports.clock.now(), self._plan.run
        with self._database.transaction(fence=self._ports.fence) as connection:
            self._end_orders(connection, row, "train", now)
            rows = self._drop_updates(connection, row)
            books.update_round(connection, run, row.number, state="failed", ended=now, reason=action.reason)
            note_round(connection, ROUND_FAILED, run, row, rows, now)
            state = books.load_strategy_state(connection, run)
            self._end_charge(connection, row.number)
        self._ports.strategy.import_state(state)
        self._forget(each.artefact_key for each in rows)
        self._end_round()
        self._invite(is_open=False, deadline=0.0)
        _log.warning("round_failed", run=run, round=row.number, reason=action.reason)

    # ---- parts ----

    def _drop_updates(self, connection: Connection, row: books.RoundRow) -> list[books.UpdateRow]:
        """In the transaction that fails a round: ends its updates, and returns them."""
        rows = books.load_updates(connection, self._plan.run, row.number, "train")
        books.end_updates(connection, self._plan.run, row.number, "train", "discarded", "round_failed")
        return rows

    def _end_charge(self, connection: Connection, number: int) -> None:
        """In the transaction that ends a round's use of noise; what it was charged stays charged."""
        if self._ports.budget is not None:
            self._ports.budget.end(connection, number)

    def _end_round(self) -> None:
        self._round, self._orders, self._folded, self._decision = None, {}, None, Decision()
        self._intake.close()

    # ---- after a restart ----

    def restore(self, row: books.RunRow) -> RoundState:
        """See `Desk.restore`; the strategy's state is read back too."""
        self._restore_head(row)
        with self._database.read() as connection:
            rounds = books.load_rounds(connection, row.run)
            moved = books.count_moved(connection, row.run)
            self._ports.strategy.import_state(books.load_strategy_state(connection, row.run))
        last = rounds[-1] if rounds else None
        self._last_number = last.number if last else 0
        self.metrics = next((each.metrics for each in reversed(rounds) if each.head_sha256), {})
        if row.status == EXHAUSTED:
            # The operator may have raised the budget since; if not, the next round says so again.
            with self._database.transaction(fence=self._ports.fence) as connection:
                books.set_run_status(connection, row.run, "active")
        failures = _failures(rounds)
        rest = self._plan.policy.backoff(failures - 1) if failures else 0.0
        state = RoundState(
            round_number=self._last_number,
            moved=moved,
            failures=failures,
            is_paused=row.status == "paused",
            not_before=last.ended + rest if last else 0.0,
        )
        if last is None or last.state not in self._phases:
            return state
        self._round = last
        state = replace(state, phase=self._phases[last.state])
        if state.phase in COLLECTING:
            kind = "evaluate" if state.phase is Phase.EVALUATING else "train"
            return self._restore_collection(last, kind, state)
        return state


def _failures(rounds: Sequence[books.RoundRow]) -> int:
    """How many rounds failed since the last that did not."""
    count = 0
    for row in reversed(rounds):
        if row.state != "failed":
            break
        count += 1
    return count
