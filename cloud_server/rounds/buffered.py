"""Buffered asynchronous aggregation: a round ends when K updates are in, whatever heads they were trained on.

Laws of the file: an update counts in one round, the one that its row names, committed before the receipt; it counts by
(1 + staleness)^-exponent of its step, where staleness is the number of heads since the one that it was trained on, as
it was committed with the round; one that is staler than the bound is refused as `too_stale`, never dropped in silence;
a device has one order at a time and one voice in an aggregate; what is in the buffer when a round fails for lack of
updates stays in it. Source: FedBuff (Nguyen et al. 2022, arXiv:2106.06639); polynomial weights: FedAsync (Xie et al.
2019, arXiv:1903.03934).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cloud_server.db import carried as orders_kept
from cloud_server.db import rounds as books
from cloud_server.db.engine import Connection
from cloud_server.rounds import events as ev
from cloud_server.rounds.intake import Intake
from cloud_server.rounds.performer import Performer
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.ports import Plan
from cloud_server.rounds.state import Collection, Phase, RoundPolicy, RoundState, Standing
from process.logs import get_logger
from wire.errors import ConfigurationError

_log = get_logger("cloud.rounds")


class BufferedPerformer(Performer):
    """Drives a buffered run by a strategy."""

    def __init__(self, plan: RunPlan, ports: RunPorts, intake: Intake) -> None:
        super().__init__(plan, ports, intake)
        self._carried: dict[str, books.OrderRow] = {}
        self._buffered: frozenset[str] = frozenset()

    # ---- what the runner asks ----

    def order_of(self, device: str) -> books.OrderRow | None:
        """The order that a device is at work on, of this round or of an earlier one."""
        return self._orders.get(device) or self._carried.get(device)

    def note_accepted(self, order: books.OrderRow) -> None:
        """Only an order that its device has accepted outlives its round."""
        if order.kind == "train":
            with self._database.transaction(fence=self._ports.fence) as connection:
                orders_kept.note_accepted(connection, order.order_id)

    # ---- actions ----

    def _open_round(self, action: ev.OpenRound) -> ev.Event:
        self._carry_into(action.round_number)
        return super()._open_round(action)

    def _opened(self, orders: Sequence[books.OrderRow], row: books.RoundRow) -> ev.Event:
        self._listen(orders, set())
        return ev.RoundOpened(
            tuple(order.device for order in orders),
            row.deadline,
            carried=tuple(sorted(self._carried)),
            answered=tuple(sorted(self._buffered)),
        )

    def _resend_order(self, action: ev.ResendOrder) -> None:
        if action.device in self._orders:  # else it has its order, or tells so when it has lost it
            super()._resend_order(action)

    def _close_collection(self, action: ev.CloseCollection) -> None:
        is_training = self._open_row().state == "training"
        for order in self._window.take_all():  # stays open across rounds: whoever is carried on must have it
            self._send(order)
        super()._close_collection(action)
        if is_training:
            self._carry_into(self._open_row().number + 1)

    def _commit_fold(self, action: ev.CommitFold) -> None:
        super()._commit_fold(action)
        self._carry_into(self._open_row().number + 1)

    def _fail_round(self, action: ev.FailRound) -> None:
        number = self._open_row().number
        super()._fail_round(action)
        self._carry_into(number + 1)

    def _finish_run(self, action: ev.FinishRun) -> None:
        run, now = self._plan.run, self._ports.clock.now()
        with self._database.transaction(fence=self._ports.fence) as connection:
            orders_kept.expire_run(connection, run, now)
            rows = books.load_updates(connection, run, self._last_number + 1, "train")
            books.end_updates(connection, run, self._last_number + 1, "train", "discarded", "run_finished")
        self._forget(each.artefact_key for each in rows)
        self._carried, self._buffered = {}, frozenset()
        self._intake.carry({}, 0)
        super()._finish_run(action)

    # ---- how a buffered round differs ----

    def _free(self, plan: Plan, devices: Mapping[int, str]) -> list[tuple[str, int]]:
        """Who was drawn and is not at work: a cohort is what the strategy wants at work at a time."""
        drawn = super()._free(plan, devices)
        return [each for each in drawn if each[0] not in self._carried and each[0] not in self._buffered]

    def _order_deadline(self, row: books.RoundRow) -> float:
        """Until as many rounds are over as the update may be old."""
        policy = self._plan.policy
        return row.deadline + policy.max_staleness * policy.round_seconds

    def _committed_terms(self, number: int, devices: Sequence[str]) -> dict[str, Any]:
        policy = self._plan.policy
        terms = {"max_staleness": policy.max_staleness, "exponent": policy.staleness_exponent}
        return {**super()._committed_terms(number, devices), "buffered": terms}

    def _end_orders(self, connection: Connection, row: books.RoundRow, kind: str, now: float) -> None:
        if kind == "train":
            orders_kept.expire_silent(connection, self._plan.run, row.number, now)
        else:
            super()._end_orders(connection, row, kind, now)

    def _drop_updates(self, connection: Connection, row: books.RoundRow) -> list[books.UpdateRow]:
        if row.state != "training":
            # What could not be folded once could not be folded in the next round either.
            return super()._drop_updates(connection, row)
        orders_kept.move_buffer(connection, self._plan.run, row.number)
        return []

    def _leave_buffer(self, connection: Connection, number: int) -> None:
        """What came between two rounds counts in the one that opens."""

    # ---- parts ----

    def _carry_into(self, number: int) -> None:
        """From now on updates of orders that devices are at work on count in this round, as far as they may."""
        run, now = self._plan.run, self._ports.clock.now()
        with self._database.transaction(fence=self._ports.fence) as connection:
            self._expire_old(connection, number, now)
            rows = orders_kept.load_carried(connection, run, number)
            waiting = books.load_updates(connection, run, number, "train")
        self._carried = {order.device: self._with_node(order) for order in rows}
        self._buffered = frozenset(row.device for row in waiting)
        self._intake.carry(self._expectations(rows), number)

    def _expire_old(self, connection: Connection, number: int, now: float) -> None:
        run, bound = self._plan.run, self._plan.policy.max_staleness
        moved = orders_kept.load_moved(connection, run)
        rows = orders_kept.load_carried(connection, run, number)
        stale = [
            row.order_id for row in rows if orders_kept.staleness(moved, row.round_number, number) > bound
        ]
        late = [row.order_id for row in rows if row.deadline <= now and row.order_id not in set(stale)]
        orders_kept.expire_each(connection, stale, now, orders_kept.TOO_STALE)
        orders_kept.expire_each(connection, late, now, "")
        if stale or late:
            _log.info("orders_expired", run=run, round=number, too_stale=len(stale), late=len(late))

    # ---- after a restart ----

    def restore(self, row: books.RunRow) -> RoundState:
        """See `Desk.restore`; orders that devices are still at work on are heard again."""
        state = super().restore(row)
        is_collecting = state.phase is Phase.TRAINING
        self._carry_into(self._last_number if is_collecting else self._last_number + 1)
        if not is_collecting:
            return state
        members = {
            **state.cohort.members,
            **dict.fromkeys(self._carried, Standing.ACCEPTED),
            **dict.fromkeys(self._buffered, Standing.ANSWERED),
        }
        return replace(state, cohort=Collection.of(members), deadline=self._open_row().deadline)


def check_buffered(
    policy: RoundPolicy, *, is_private: bool, is_adding_noise: bool, has_app: bool, needs_reference: bool
) -> None:
    """Refuses what does not go with updates of several bases.

    Args:
        is_private: the run has differential privacy of ours.
        is_adding_noise: the strategy is one of Flower's wrappers that add noise.
        has_app: a stock ServerApp drives the rounds.
        needs_reference: the strategy measures updates by one that is trained on the round's base.

    Raises:
        ConfigurationError: (operator) names what must be changed.
    """
    if not policy.is_buffered:
        return
    reasons = (
        (
            policy.is_masked,
            "masks cancel in a sum over one base and one cohort",
            "set secure.policy to plain",
        ),
        (is_private, "its charge is for a cohort that is drawn anew each round", "set privacy.mode to off"),
        (is_adding_noise, "its noise is made for a cohort of one round", "use FedAvg or ClippedMean"),
        (has_app, "a ServerApp runs its own loop", "leave run.serverapp empty"),
        (
            needs_reference,
            "FLTrust scales each update to the length of one that is trained on the round's base, which undoes the"
            " weight of staleness",
            "use ClippedMean",
        ),
    )
    for is_so, why, hint in reasons:
        if is_so:
            raise ConfigurationError(f"not in buffered rounds: {why}", hint=f"{hint}, or run.mode to sync")
