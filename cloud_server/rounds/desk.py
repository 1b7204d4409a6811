"""What every way of driving a run has in common: its head, the round under way, its orders, and sending them.

Laws of the file: nothing leaves before what it says is committed; no number that matters is kept only in memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cloud_server.db import carried
from cloud_server.db import rounds as books
from cloud_server.db.engine import Connection
from cloud_server.influence import capped_weights
from cloud_server.privacy.budget import EXHAUSTED
from cloud_server.rounds import events as ev
from cloud_server.rounds.chronicle import Origin
from cloud_server.rounds.head_step import StepTaken
from cloud_server.rounds.intake import Intake
from cloud_server.rounds.order_window import OrderWindow
from cloud_server.rounds.orders import expected_reply, order_message, round_norm, round_train
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.ports import Measured
from cloud_server.rounds.replies import StoredReplies
from cloud_server.rounds.state import NEVER, Collection, Phase, RoundState, Standing
from cloud_server.screening import RUNNING_ROUNDS, Expected, norm_bound, norm_median
from process.logs import get_logger
from wire.checkpoint import Checkpoint
from wire.codec import ErrorFeedback
from wire.errors import RoundError, StorageError
from wire.messages import BlobRef, Body, HeadPatch, Invitation, TrainConfig

_log = get_logger("cloud.rounds")
NORM_MEDIAN = "update_norm_median"
"""Metric of a round: how long its updates were, before any was clipped."""


class Desk(ABC):
    """Performs the actions of one run. Holds its head, and the round and orders under way."""

    def __init__(self, plan: RunPlan, ports: RunPorts, intake: Intake) -> None:
        self._plan = plan
        self._ports = ports
        self._intake = intake
        self._database = ports.database
        self._seed = 0
        self._taken: StepTaken | None = None
        self._moved_by = 0  # the round that the head came out of; 0: the run began with it
        self._round: books.RoundRow | None = None
        self._orders: dict[str, books.OrderRow] = {}
        self._window = OrderWindow()
        self._published: tuple[BlobRef, HeadPatch | None] | None = None
        self._last_number = 0
        self.metrics: Mapping[str, float] = {}
        self._performers: dict[type[ev.Action], Callable[[Any], ev.Event | None]] = {
            ev.SendOrders: self._send_orders,
            ev.ResendOrder: self._resend_order,
            ev.CloseCollection: self._close_collection,
            ev.FinishRun: self._finish_run,
        }

    # ---- what the runner asks ----

    @property
    def head(self) -> Checkpoint:
        """The newest head.

        Raises:
            RoundError: (us) before `restore`.
        """
        return self._step.head

    @property
    def _step(self) -> StepTaken:
        """How the newest head came about."""
        if self._taken is None:
            raise RoundError("the run was not resumed")
        return self._taken

    @abstractmethod
    def restore(self, row: books.RunRow) -> RoundState:
        """Reads back where the run stands; the machine goes on from there.

        Raises:
            StorageError: (disk) the run has no head.
        """

    def order_of(self, device: str) -> books.OrderRow | None:
        """The order of a device in the collection under way."""
        return self._orders.get(device)

    def perform(self, action: ev.Action) -> ev.Event | None:
        """Does one action; returns what it answers to the machine, if it answers."""
        return self._performers[type(action)](action)

    def poll(self, phase: Phase, *, is_paused: bool) -> ev.Event | None:
        """What came from elsewhere than the fleet since the last turn."""
        return None

    def send_waiting(self) -> float:
        """Sends the orders of a large cohort that may leave; seconds until it wants to be asked again at the latest,
        `NEVER` if none is left."""
        now = self._ports.clock.monotonic()
        for order in self._window.take(now):
            self._send(order)
        return self._window.wait(now)

    def note_heard(self, device: str) -> None:
        """A device answered an order."""
        self._window.heard(device)

    def note_accepted(self, order: books.OrderRow) -> None:
        """A device is at work on its order."""
        return

    def take_masking(self, device: str, body: Body) -> ev.Event | None:
        """What a device sent for a masked round; a run without masks has no use for it."""
        return None

    def note_stored(self, device: str, update_id: bytes) -> None:
        """A reply was committed; the machine hears of it in the next turn."""
        return

    # ---- actions ----

    def _send_orders(self, action: ev.SendOrders) -> None:
        # Who is at work on the order of an earlier round is not sent it again.
        orders = {device: self._orders[device] for device in action.devices if device in self._orders}
        if not orders:
            return
        self._invite(is_open=True, deadline=next(iter(orders.values())).deadline)
        self._window.fill(orders)
        self.send_waiting()

    def _resend_order(self, action: ev.ResendOrder) -> None:
        if action.device not in self._window:
            self._send(self._orders[action.device])

    def _close_collection(self, _action: ev.CloseCollection) -> None:
        self._window.fill({})
        row, now = self._open_row(), self._ports.clock.now()
        kind, state = ("train", "folding") if row.state == "training" else ("evaluate", "deciding")
        with self._database.transaction(fence=self._ports.fence) as connection:
            self._end_orders(connection, row, kind, now)
            books.update_round(connection, self._plan.run, row.number, state=state)
        self._round = replace(row, state=state)
        self._intake.close()

    def _finish_run(self, action: ev.FinishRun) -> None:
        status = EXHAUSTED if action.reason else "finished"
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.set_run_status(connection, self._plan.run, status)
        self._invite(is_open=False, deadline=0.0)
        _log.info("run_finished", run=self._plan.run, status=status, reason=action.reason)

    # ---- parts ----

    def _end_orders(self, connection: Connection, row: books.RoundRow, kind: str, now: float) -> None:
        """Ends what is still open of a collection, in the transaction that closes it."""
        books.expire_orders(connection, self._plan.run, row.number, kind, now)

    def _open_row(self) -> books.RoundRow:
        if self._round is None:
            raise RoundError("no round is open")
        return self._round

    def _devices_by_node(self) -> dict[int, str]:
        return {node_id: device for device, node_id in self._ports.nodes.present().items()}

    def _with_node(self, order: books.OrderRow) -> books.OrderRow:
        return replace(order, node_id=self._ports.nodes.node_id(order.device))

    def _listen(self, orders: Sequence[books.OrderRow], answered: set[bytes]) -> None:
        """From now on replies to these orders are taken."""
        self._orders = {order.device: order for order in orders}
        self._window.fill({})
        self._intake.open({order.order_id: self._expected(order) for order in orders}, answered)

    def _expected(self, order: books.OrderRow) -> Expected:
        cap = self._ports.nodes.max_examples(order.device)
        bound = math.inf if self._round is None else round_norm(self._round)
        return expected_reply(self._plan, order, self._train(), cap, bound)

    def _committed_norm(self) -> dict[str, float]:
        """What the rounds so far say about the length of the next one's updates; a part of its configuration."""
        with self._database.read() as connection:
            medians = books.load_metric(connection, self._plan.run, NORM_MEDIAN, last=RUNNING_ROUNDS)
        bound = norm_bound(medians, factor=self._plan.norm_factor)
        return {"norm_bound": bound} if math.isfinite(bound) else {}

    def _measured_norm(self, number: int) -> dict[str, float]:
        """How long the updates of a round were; a part of its metrics."""
        with self._database.read() as connection:
            median = norm_median(books.load_norms(connection, self._plan.run, number))
        return {NORM_MEDIAN: median} if median > 0.0 else {}

    def _measurements(self, number: int) -> list[Measured]:
        """What the devices measured in a round, by update id; none weighs more than a few of the others."""
        with self._database.read() as connection:
            rows = books.load_updates(connection, self._plan.run, number, "evaluate")
        weights = capped_weights([row.num_examples for row in rows])
        node_id = self._ports.nodes.node_id
        return [
            Measured(node_id(row.device), weight, row.metrics)
            for row, weight in zip(rows, weights, strict=True)
        ]

    def _train(self) -> TrainConfig:
        return self._plan.train if self._round is None else round_train(self._round)

    def _send(self, order: books.OrderRow) -> None:
        self._ports.outbox.send_order(order.device, order_message(self._plan, order, self._train()))

    def _invite(self, *, is_open: bool, deadline: float) -> None:
        if is_open and self._published is None:
            self._published = self._publish_head()
        # A closed invitation names the head, but nobody trains on it.
        named = self._published if is_open else None
        head, patch = named or (self._ports.outbox.publish_blob(self.head.to_bytes(), broadcast=False), None)
        self._ports.outbox.send_invitation(
            Invitation(
                run=self._plan.run,
                round_number=self._last_number,
                open=is_open,
                deadline=deadline,
                graphs_sha256=self._plan.graphs_sha256,
                head=head,
                train=self._train(),
                head_on_need=is_open and self._is_on_need,
                patch=patch,
            )
        )

    @property
    def _is_on_need(self) -> bool:
        """Whether most devices can have the head without being sent it: from a patch, or from the release that the
        run began with."""
        return bool(self._step.patch) or self._moved_by == 0

    def _publish_head(self) -> tuple[BlobRef, HeadPatch | None]:
        """The patch goes out to all; the whole head only where there is none, or to who asks."""
        step, outbox = self._step, self._ports.outbox
        head = outbox.publish_blob(step.head.to_bytes(), broadcast=not self._is_on_need)
        if not step.patch:
            return head, None
        return head, HeadPatch(base_sha256=step.base_sha256, blob=outbox.publish_blob(step.patch))

    def _keep_step(self, round_number: int, step: StepTaken) -> books.HeadRow:
        """Puts a new head, its patch and what is owed where the row that is committed next says that they are."""
        blobs = self._ports.blobs
        blobs.put_blob(step.head.to_bytes())
        residual = b"" if step.residual is None else ErrorFeedback(step.residual).to_bytes()
        return books.HeadRow(
            round_number=round_number,
            sha256=step.head.sha256,
            base_sha256=step.base_sha256,
            patch_key=blobs.put_blob(step.patch) if step.patch else "",
            residual_key=blobs.put_blob(residual) if residual else "",
        )

    def _move_head(self, step: StepTaken, round_number: int) -> None:
        """After the commit."""
        self._taken, self._moved_by, self._published = step, round_number, None

    def _stored_replies(self, row: books.RoundRow) -> StoredReplies:
        """The committed updates of a round."""
        with self._database.read() as connection:
            rows = books.load_updates(connection, self._plan.run, row.number, "train")
            orders = list(carried.load_orders_of_stored(connection, self._plan.run, row.number).values())
            origins = self._origins(connection, row)
        exponent = float(row.config.get("buffered", {}).get("exponent", 0.0))
        return StoredReplies(
            self._database,
            self._ports.blobs,
            rows,
            self._expectations(orders, round_norm(row)),
            {order.device: self._ports.nodes.node_id(order.device) for order in orders},
            self._intake.kept,
            {update_id: origin.factor(exponent) for update_id, origin in origins.items()},
        )

    def _expectations(
        self, orders: Sequence[books.OrderRow], norm_bound: float = math.inf
    ) -> dict[bytes, Expected]:
        """What the replies to training orders must be like, each as its own round asked; by order id."""
        if not orders:
            return {}
        oldest = min(order.round_number for order in orders)
        with self._database.read() as connection:
            known = books.load_rounds(connection, self._plan.run, last=self._last_number - oldest + 1)
        train = {row.number: round_train(row) for row in known if row.number >= oldest}
        cap = self._ports.nodes.max_examples
        return {
            order.order_id: expected_reply(
                self._plan, order, train[order.round_number], cap(order.device), norm_bound
            )
            for order in orders
        }

    def _origins(self, connection: Connection, row: books.RoundRow) -> dict[bytes, Origin]:
        """Where the stored updates of a round come from, if it is a buffered one; by update id."""
        if "buffered" not in row.config:
            return {}
        run = self._plan.run
        moved = carried.load_moved(connection, run)
        orders = carried.load_orders_of_stored(connection, run, row.number)
        found = {}
        for update in books.load_updates(connection, run, row.number, "train"):
            order = orders[update.order_id]
            stale = carried.staleness(moved, order.round_number, row.number)
            found[update.update_id] = Origin(order.head_sha256, order.round_number, stale)
        return found

    def _forget(self, keys: Iterable[str]) -> None:
        """After the commit; a blob that stays behind because the process ends here is only space."""
        for key in keys:
            if key:
                self._ports.blobs.delete_blob(key)

    # ---- after a restart ----

    def _restore_head(self, row: books.RunRow) -> None:
        self._seed = row.seed
        with self._database.read() as connection:
            found = books.load_head_row(connection, row.run)
        if found is None:
            raise StorageError(f"the run {row.run} has no head", run=row.run)
        blobs = self._ports.blobs
        head = Checkpoint.from_bytes(blobs.get_blob(found.sha256.hex()))
        step = StepTaken(head)
        if found.patch_key:
            feedback = ErrorFeedback.from_bytes(blobs.get_blob(found.residual_key), len(head.params))
            step = StepTaken(head, found.base_sha256, blobs.get_blob(found.patch_key), feedback.residual)
        self._move_head(step, found.round_number)

    def _restore_collection(self, row: books.RoundRow, kind: str, state: RoundState) -> RoundState:
        """Takes replies to the committed orders again."""
        with self._database.read() as connection:
            orders = books.load_orders(connection, self._plan.run, row.number, kind)
            stored = books.load_updates(connection, self._plan.run, row.number, kind)
            refused = books.load_updates(connection, self._plan.run, row.number, kind, "refused")
        answered = {each.order_id for each in stored}
        self._listen([self._with_node(order) for order in orders], answered)
        declined = {each.order_id for each in refused}
        members = {order.device: _standing(order, answered, declined) for order in orders}
        deadline = orders[0].deadline if orders else NEVER
        return replace(state, cohort=Collection.of(members), deadline=deadline)


def _standing(order: books.OrderRow, stored: set[bytes], refused: set[bytes]) -> Standing:
    if order.order_id in stored:
        return Standing.ANSWERED
    if order.order_id in refused:
        return Standing.REFUSED
    return Standing.DECLINED if order.state == "declined" else Standing.WAITING
