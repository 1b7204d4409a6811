"""The shell around the round machine: what the service reports goes in, what the machine asks for is
performed.

Laws of the file: one thread; `on_…` commits and takes note, `tick` does what follows, so that a receipt
leaves before a fold begins; the same events at the same times give the same run, bit for bit. After an
exception from `tick` make a new runner and `resume`: what was committed is all that counts. Source:
docs/architecture.md (The aggregator).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from cloud_server.db import rounds as books
from cloud_server.rounds import events as ev
from cloud_server.rounds.desk import Desk
from cloud_server.rounds.intake import Arrival, Intake
from cloud_server.rounds.machine import step
from cloud_server.rounds.performer import Performer
from cloud_server.rounds.plan import RunPlan, RunPorts, RunView
from cloud_server.rounds.state import NEVER, Phase, RoundState
from process.logs import get_logger
from wire.checkpoint import Checkpoint
from wire.errors import ConfigurationError, UpdateError
from wire.messages import Join, MaskKeys, MaskOpened, MaskShares, Receipt

_log = get_logger("cloud.rounds")


class RoundRunner:
    """Drives one run: `resume` once, then `tick` after whatever was fed in and whenever `next_tick` has come.

    Args:
        make_desk: makes what performs the actions: by a strategy, or for a stock ServerApp.
    """

    def __init__(
        self,
        plan: RunPlan,
        ports: RunPorts,
        *,
        make_desk: Callable[[RunPlan, RunPorts, Intake], Desk] = Performer,
    ) -> None:
        self._plan = plan
        self._ports = ports
        self._intake = Intake(ports.database, ports.fence, ports.blobs, plan.run, ports.clock, plan.strikes)
        self._desk = make_desk(plan, ports, self._intake)
        self._state = RoundState()
        self._queue: deque[ev.Event] = deque()
        self._declined: list[tuple[bytes, str]] = []
        self._is_paused = self._is_held = False
        self._next_tick = NEVER

    # ---- what the service asks ----

    @property
    def head(self) -> Checkpoint:
        """The newest head."""
        return self._desk.head

    @property
    def phase(self) -> Phase:
        return self._state.phase

    @property
    def is_finished(self) -> bool:
        return self._state.phase is Phase.FINISHED

    @property
    def next_tick(self) -> float:
        """When `tick` must be called at the latest (unix seconds): now if something waits, `inf` for
        never."""
        return self._ports.clock.now() if self._queue else self._next_tick

    @property
    def intake(self) -> Intake:
        """Where replies come in; for what it counts."""
        return self._intake

    def view(self) -> RunView:
        """The run as it stands."""
        state = self._state
        return RunView(
            run=self._plan.run,
            phase=state.phase,
            round_number=state.round_number,
            moved=state.moved,
            failures=state.failures,
            cohort=len(state.cohort.members),
            answered=state.cohort.answered,
            deadline=state.deadline,
            head_sha256=self.head.sha256,
            metrics=self._desk.metrics,
        )

    # ---- what the service reports ----

    def resume(self, initial: Checkpoint, seed: int) -> None:
        """Begins the run, or goes on where the database says that it was.

        Args:
            initial: the head of a new run; ignored where the run exists.
            seed: 0 … 2**63 − 1, secret, for a new run; ignored where the run exists.

        Raises:
            ConfigurationError: (operator) the run exists with another model.
            BundleError: (operator) `initial` is of another model.
        """
        with self._ports.database.read() as connection:
            known = books.load_run(connection, self._plan.run)
        if known is None:
            known = self._begin(initial, seed)
        if known.graphs_sha256 != self._plan.graphs_sha256:
            raise ConfigurationError(
                f"the run {known.run} trains another model",
                hint="give the new run another name",
                run=known.run,
            )
        self._state = self._desk.restore(known)
        self._is_paused = self._state.is_paused
        self._queue.append(ev.Resumed())
        self.on_nodes_changed()

    def on_nodes_changed(self) -> None:
        """Approval or presence changed."""
        ports = self._ports
        self._queue.append(ev.NodesChanged(frozenset(ports.nodes.present()), ports.return_seconds()))

    def on_node_returned(self, device: str) -> None:
        """A device that nobody saw leave connected anew."""
        self._queue.append(ev.NodeReturned(device))

    def on_node_lost(self, device: str) -> None:
        """A device's last will arrived."""
        self._queue.append(ev.NodeLost(device))

    def on_join(self, device: str, join: Join) -> None:
        """A device answered an order; an answer to an order that is not its own, or is over, is dropped."""
        order = self._desk.order_of(device)
        if order is None or order.order_id != join.order_id:
            return
        self._desk.note_heard(device)
        if not join.accepted:
            self._declined.append((order.order_id, join.reason))
        else:
            self._desk.note_accepted(order)
        self._queue.append(ev.JoinArrived(device, join.accepted))

    def on_masking(self, device: str, body: MaskKeys | MaskShares | MaskOpened) -> None:
        """A device sent what a phase of a masked round asks for; what does not fit is dropped and logged."""
        order = self._desk.order_of(device)
        if order is None or order.order_id != body.order_id:
            return
        try:
            event = self._desk.take_masking(device, body)
        except UpdateError as error:
            _log.warning("masking_refused", device=device, type=body.TYPE, reason=str(error))
            return
        if event is not None:
            self._queue.append(event)

    def on_updates(self, arrivals: Sequence[Arrival]) -> list[Receipt]:
        """Takes opened `up` and `ev` messages: screens them and commits them together.

        Returns:
            Their receipts, to be sent at once.

        Raises:
            StorageError: (disk) nothing was committed; send nothing, the devices will try again.
        """
        receipts = []
        for arrival, (receipt, event) in zip(arrivals, self._intake.take(arrivals), strict=True):
            if event is not None:
                self._queue.append(event)
            if receipt.verdict == "stored":
                self._desk.note_stored(arrival.device, receipt.update_id)
            if receipt.verdict == "refused":
                _log.info("reply_refused", device=arrival.device, reason=receipt.reason)
            receipts.append(receipt)
        return receipts

    def set_paused(self, is_paused: bool) -> None:
        """Stops or goes on with opening rounds; a round under way ends well."""
        with self._ports.database.transaction(fence=self._ports.fence) as connection:
            books.set_run_status(connection, self._plan.run, "paused" if is_paused else "active")
        # Before anything that waits: no round opens after this returned.
        self._is_paused = is_paused
        self._queue.appendleft(ev.RunPaused(self._is_paused or self._is_held))

    def hold(self, is_held: bool) -> None:
        """As `set_paused`, for as long as this process lives and beside what an operator wants: nothing is written."""
        self._is_held = is_held
        self._queue.appendleft(ev.RunPaused(self._is_paused or self._is_held))

    def tick(self) -> float:
        """Does all that is due now; returns `next_tick`."""
        self._book_declined()
        if self._next_tick <= self._ports.clock.now():
            self._next_tick = NEVER
            self._queue.append(ev.Tick())
        while self._queue or self._poll():
            self._take(self._queue.popleft())
        return min(self._next_tick, self._ports.clock.now() + self._desk.send_waiting())

    def _book_declined(self) -> None:
        """All that were declined since the last turn, in one commit: a fleet without samples declines as one."""
        if not self._declined:
            return
        now = self._ports.clock.now()
        with self._ports.database.transaction(fence=self._ports.fence) as connection:
            for order_id, reason in self._declined:
                books.set_order_state(connection, order_id, "declined", now, reason)
        self._declined.clear()

    def _poll(self) -> bool:
        event = self._desk.poll(self._state.phase, is_paused=self._state.is_paused)
        if event is not None:
            self._queue.append(event)
        return event is not None

    def _take(self, event: ev.Event) -> None:
        """One event; what its actions answer comes before anything else that waits."""
        self._state, actions = step(self._state, event, self._ports.clock.now(), self._plan.policy)
        answers: list[ev.Event] = []
        for action in actions:
            if isinstance(action, ev.SetTimer):
                self._next_tick = action.at
            elif (answer := self._desk.perform(action)) is not None:
                answers.append(answer)
        self._queue.extendleft(reversed(answers))

    def _begin(self, initial: Checkpoint, seed: int) -> books.RunRow:
        initial.check(self._plan.manifest)
        row = books.RunRow(run=self._plan.run, graphs_sha256=self._plan.graphs_sha256, seed=seed)
        now = self._ports.clock.now()
        self._ports.blobs.put_blob(initial.to_bytes())
        with self._ports.database.transaction(fence=self._ports.fence) as connection:
            books.insert_run(connection, row, now)
            head = books.HeadRow(round_number=0, sha256=initial.sha256)
            books.insert_head(connection, row.run, head, now)
        return row
