"""Drives a run for a stock ServerApp: each of its exchanges becomes a recorded round on our transport.

Laws of the file: an exchange is committed before its orders leave, and its replies are kept until the run ends, so
that after a restart the app is run again from its start (`tape.py`) and its replies come out of the books; no device is
asked twice for an exchange that is done. The newest arrays that the app sends out are the head. Source:
DESIGN.md (Flower is joined at the `Grid`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict

from cloud_server.db import grid_steps
from cloud_server.db import rounds as books
from cloud_server.flower.exchange import Board, Exchange, Given, MakeReply
from cloud_server.flower.private import NODE_UNAVAILABLE
from cloud_server.flower.records import AppArrays, to_config
from cloud_server.flower.tape import Tape
from cloud_server.rounds import events as ev
from cloud_server.rounds.chronicle import EXCHANGE_DONE, note_round
from cloud_server.rounds.desk import Desk
from cloud_server.rounds.draws import draw_seed
from cloud_server.rounds.head_step import StepTaken
from cloud_server.rounds.intake import Intake
from cloud_server.rounds.orders import expected_reply, make_orders, needed_metrics, round_norm, round_train
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.ports import Candidate, Decision, Scalar, Vector
from cloud_server.rounds.replies import StoredReplies
from cloud_server.rounds.state import Phase, RoundState
from process.logs import get_logger
from wire.errors import ModelError, RoundError, StorageError
from wire.messages import TrainConfig

_log = get_logger("cloud.serverapp")
_KINDS = ("train", "evaluate")
_OPEN = {"training": "train", "evaluating": "evaluate"}
# What apps call the settings of our devices (Flower's examples use the first of each).
_SETTINGS = {
    "lr": "learning_rate",
    "learning-rate": "learning_rate",
    "learning_rate": "learning_rate",
    "local-epochs": "epochs",
    "local_epochs": "epochs",
    "epochs": "epochs",
    "batch-size": "batch_size",
    "batch_size": "batch_size",
    "momentum": "momentum",
    "weight-decay": "weight_decay",
    "proximal-mu": "proximal_mu",
    "clipping_norm": "clipping_norm",
}


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What an exchange asks for.

    Attributes:
        template: the record that the app sent, whose keys the replies have.
        digest: of all that decides what devices are told, hex.
        metrics: names of those that every reply has, which the app is given.
    """

    exchange: Exchange
    kind: str
    template: ArrayRecord
    arrays: AppArrays
    params: Vector
    buffers: Vector
    train: TrainConfig
    digest: str
    metrics: frozenset[str]


class ExchangeDesk(Desk):
    """Performs the exchanges of one app.

    Args:
        tape: of the app; loaded here, then the app's.
        start: starts the app's thread, with the run's seed; called unless the run is finished.
        seconds: longest wait for the replies of each kind of exchange.
    """

    def __init__(
        self,
        plan: RunPlan,
        ports: RunPorts,
        intake: Intake,
        *,
        board: Board,
        tape: Tape,
        start: Callable[[int], None],
        seconds: Mapping[str, float],
    ) -> None:
        super().__init__(plan, ports, intake)
        self._seconds = seconds
        self._board = board
        self._tape = tape
        self._start = start
        self._active: Request | None = None
        self._recorded: dict[int, books.RoundRow] = {}
        self._decision = Decision()
        self._performers |= {ev.Decide: self._decide, ev.CommitRound: self._commit_round}

    def restore(self, row: books.RunRow) -> RoundState:
        """See `Desk.restore`; starts the app, which begins again and is given what was recorded."""
        self._restore_head(row)
        with self._database.read() as connection:
            rounds = books.load_rounds(connection, row.run)
            steps = grid_steps.load_steps(connection, row.run)
        self._tape.load(steps)
        self._recorded = {each.number: each for each in rounds if each.number > self._tape.after}
        self._last_number = rounds[-1].number if rounds else 0
        self.metrics = rounds[-1].metrics if rounds else {}
        if row.status == "finished":
            return RoundState(phase=Phase.FINISHED, round_number=self._last_number)
        if rounds and rounds[-1].state in _OPEN:
            # What its devices send is taken from now on, before the app has asked for it again.
            self._round = rounds[-1]
            self._restore_collection(rounds[-1], _OPEN[rounds[-1].state], RoundState())
        self._board.begin_after(self._tape.after)
        if steps:
            _log.info("serverapp_played_back", run=row.run, steps=len(steps), exchanges=len(self._recorded))
        self._start(row.seed)
        done = sum(each.state == "done" for each in rounds)
        return RoundState(round_number=done, moved=sum(bool(each.head_sha256) for each in rounds))

    def poll(self, phase: Phase, *, is_paused: bool) -> ev.Event | None:
        """Takes what the app asks for; while the run is paused, the app waits."""
        self._board.set_node_ids(sorted(self._devices_by_node()))
        while phase is Phase.IDLE and not is_paused and (exchange := self._board.next()) is not None:
            try:
                event = self._open(exchange)
            except (RoundError, ModelError) as error:
                self._board.refuse(exchange, error)
                continue
            if event is not None:
                return event
        return ev.RunEnded() if phase is Phase.IDLE and self._board.is_ended else None

    def note_stored(self, device: str, update_id: bytes) -> None:
        """Gives the app a reply as soon as it is committed, unless it has not asked again since a restart."""
        if self._active is None:
            return
        with self._database.read() as connection:
            found = books.load_update(connection, update_id)
        if found is not None:
            self._deliver(self._active, self._open_row(), [found])

    # ---- opening ----

    def _open(self, exchange: Exchange) -> ev.Event | None:
        """Begins an exchange, goes on with one, or answers one from the books (then there is no event)."""
        request = read_request(exchange, self._plan, self.head.buffers)
        row = self._recorded.get(exchange.number)
        if row is None and exchange.number > self._last_number:
            return self._begin(request)
        if row is None:
            raise RoundError("these messages could not be sent before the restart")
        if row.config.get("request") != request.digest:
            raise RoundError(
                "the app asks for something else than before the restart",
                hint="make it deterministic (seeds, no clock), or give the run another name",
            )
        with self._database.read() as connection:
            rows = books.load_updates(connection, self._plan.run, row.number, request.kind)
        self._deliver(request, row, rows)
        if row.state == "done":
            self._deliver_errors(exchange)
            return None
        return self._take_up(request, row, {each.device for each in rows})

    def _begin(self, request: Request) -> ev.Event:
        """Commits a new exchange; the app's arrays become the head where they are new."""
        exchange = request.exchange
        number, now = exchange.number, self._ports.clock.now()
        seed = draw_seed(self._seed, "round", number)
        head = self.head
        if (request.params != head.params).any() or (request.buffers != head.buffers).any():
            finisher = self._ports.finisher
            params = finisher.refine(request.params, request.buffers, draw_seed(seed, "finish"))
            # As it is, not as a patch: an app of somebody else may make steps of any size.
            head = finisher.finish(params, request.buffers, head)
            head.check(self._plan.manifest)
            self._ports.blobs.put_blob(head.to_bytes())
        is_moved = head is not self.head
        devices = self._devices_by_node()
        asked = [message.metadata.dst_node_id for message in exchange.messages]
        members = [(devices[node_id], node_id) for node_id in asked if node_id in devices]
        longest = self._seconds[request.kind]
        deadline = now + min(longest, exchange.seconds or longest)
        row = books.RoundRow(
            number=number,
            state="training" if request.kind == "train" else "evaluating",
            base_sha256=head.sha256,
            head_sha256=head.sha256 if is_moved else b"",
            deadline=deadline,
            config={
                "train": msgspec.to_builtins(request.train),
                "request": request.digest,
                **self._committed_norm(),
            },
            seed=seed,
            node_ids=asked,
            started=now,
        )
        orders = make_orders(self._seed, number, request.kind, members, head.sha256, deadline)
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.insert_round(connection, self._plan.run, row)
            books.insert_orders(connection, self._plan.run, orders, now)
            if is_moved:
                row_of_head = books.HeadRow(round_number=number, sha256=head.sha256)
                books.insert_head(connection, self._plan.run, row_of_head, now)
        if is_moved:
            self._move_head(StepTaken(head), number)
        self._round, self._last_number, self._active = row, number, request
        self._listen(orders, set())
        _log.info(
            "exchange_opened", run=self._plan.run, exchange=number, kind=request.kind, nodes=len(orders)
        )
        return ev.EvaluationOpened(tuple(device for device, _ in members), deadline)

    def _take_up(self, request: Request, row: books.RoundRow, answered: set[str]) -> ev.Event:
        """Goes on with the exchange that was open when the process before ended."""
        self._round, self._active = row, request
        waiting = [
            device
            for device, order in self._orders.items()
            if device not in answered and order.state not in ("declined", "expired")
        ]
        return ev.EvaluationOpened(tuple(waiting), row.deadline)

    # ---- closing ----

    def _decide(self, _action: ev.Decide) -> ev.Event:
        """What the app evaluated is a candidate; so is what it trains on without ever having it evaluated."""
        row, request = self._open_row(), self._active
        self._decision = Decision()
        is_new = bool(row.head_sha256) and row.number > 1
        if request is None or (request.kind == "train" and not is_new):
            return ev.DecisionMade()
        measured = self._measurements(row.number)
        metrics: Mapping[str, float] = {}
        try:
            if measured:
                metrics = self._ports.strategy.aggregate_evaluate(row.number, measured)
            candidate = Candidate(
                run=self._plan.run,
                round_number=row.number,
                checkpoint=self.head,
                metrics=metrics,
                devices=len(measured),
                measured=measured,
            )
            self._decision = self._ports.releaser.decide(candidate)
        except (RoundError, ModelError) as error:
            _log.warning("exchange_not_decided", run=self._plan.run, exchange=row.number, reason=str(error))
            self._decision = Decision(reason=f"not decided: {error}")
        self.metrics = {**metrics, **self._decision.metrics}
        return ev.DecisionMade()

    def _commit_round(self, _action: ev.CommitRound) -> None:
        row, now = self._open_row(), self._ports.clock.now()
        values: dict[str, Any] = {"state": "done", "ended": now, "reason": self._decision.reason}
        metrics = {**self.metrics, **self._measured_norm(row.number)}
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.update_round(connection, self._plan.run, row.number, metrics=metrics, **values)
            kind = "train" if self._active is None else self._active.kind
            replies = books.load_updates(connection, self._plan.run, row.number, kind)
            head, run = row.head_sha256.hex(), self._plan.run
            note_round(connection, EXCHANGE_DONE, run, row, replies, now, head=head, asked=kind)
        if self._active is not None:
            self._deliver_errors(self._active.exchange)
        self._round, self._orders, self._active = None, {}, None
        self._intake.close()

    def _finish_run(self, action: ev.FinishRun) -> None:
        """An app that failed leaves its run open: started again, it goes on where it was. A disk that would not keep
        its step was no fault of the app's: the process ends, and the next one plays the app back.

        Raises:
            StorageError: (disk) a step of the app could not be kept.
        """
        error = self._board.error
        if isinstance(error, StorageError):
            raise error
        if error is not None:
            position = error.facts.get("position", self._tape.position)
            facts = {"step": position, "reason": str(error), "hint": error.hint}
            _log.error("serverapp_failed", run=self._plan.run, **facts)
            self._invite(is_open=False, deadline=0.0)
            return
        with self._database.transaction(fence=self._ports.fence) as connection:
            keys = books.load_artefact_keys(connection, self._plan.run)
            books.end_run_updates(connection, self._plan.run, "folded")
            grid_steps.drop_steps(connection, self._plan.run)
        for key in keys:
            self._ports.blobs.delete_blob(key)
        super()._finish_run(action)

    # ---- replies ----

    def _deliver(self, request: Request, row: books.RoundRow, rows: list[books.UpdateRow]) -> None:
        messages = {message.metadata.dst_node_id: message for message in request.exchange.messages}
        for each in rows:
            message = messages.get(self._ports.nodes.node_id(each.device))
            if message is not None:
                update = self._update_of(row, each) if request.kind == "train" else None
                maker = _maker(message, each, update, request)
                self._board.deliver(Given(message.metadata.message_id, each.update_id.hex(), maker))

    def _update_of(self, row: books.RoundRow, update: books.UpdateRow) -> StoredReplies:
        """One stored update, read and decoded when the app reads it."""
        nodes = self._ports.nodes
        order = books.OrderRow(
            order_id=update.order_id,
            round_number=row.number,
            device=update.device,
            node_id=nodes.node_id(update.device),
            kind="train",
            head_sha256=row.base_sha256,
            deadline=row.deadline,
        )
        cap = nodes.max_examples(update.device)
        bound = round_norm(row)
        expected = {update.order_id: expected_reply(self._plan, order, round_train(row), cap, bound)}
        node_ids = {update.device: order.node_id}
        kept = self._intake.kept
        return StoredReplies(self._database, self._ports.blobs, [update], expected, node_ids, kept)

    def _deliver_errors(self, exchange: Exchange) -> None:
        """An error reply for every message that has no other."""
        for message in exchange.messages:
            error = Error(NODE_UNAVAILABLE, "no usable answer before the deadline")
            self._board.deliver(Given(message.metadata.message_id, "error", _error_maker(message, error)))


def read_request(exchange: Exchange, plan: RunPlan, buffers: Vector) -> Request:
    """Reads what an app's messages ask of our devices.

    Raises:
        RoundError: (app) not something that our devices do; says what.
    """
    first = exchange.messages[0]
    kind = first.metadata.message_type.split(".")[0]
    if kind not in _KINDS:
        raise RoundError(f"devices cannot answer messages of the type {first.metadata.message_type!r}")
    if any(m.metadata.message_type != first.metadata.message_type for m in exchange.messages):
        raise RoundError("the messages of one exchange must be of one type")
    if any(m.content is not first.content for m in exchange.messages):
        _check_same(exchange)
    records = first.content.array_records
    if any(key.startswith(("fitins", "evaluateins")) for key in records):
        raise RoundError(
            "the app is written for Flower's legacy API", hint="use flwr.serverapp.strategy with @app.main()"
        )
    if len(records) != 1:
        raise RoundError(
            f"a message has {len(records)} array records", hint="send the model as one ArrayRecord"
        )
    template = next(iter(records.values()))
    arrays = AppArrays.of(template, plan.manifest)
    params, own_buffers = arrays.vectors(template, buffers)
    config: dict[str, Scalar] = {}
    for record in first.content.config_records.values():
        config |= to_config(record)
    train = _train_of(plan.train, config)
    nodes = [message.metadata.dst_node_id for message in exchange.messages]
    text = repr((kind, nodes, sorted(config.items()), msgspec.to_builtins(train))).encode()
    sent = own_buffers.tobytes() if arrays.buffers else b""
    digest = hashlib.sha256(text + params.tobytes() + sent).hexdigest()
    metrics = needed_metrics(plan, kind)
    return Request(exchange, kind, template, arrays, params, own_buffers, train, digest, metrics)


def _check_same(exchange: Exchange) -> None:
    """Devices share one head and one configuration; apps that send copies of it are fine."""
    ids = {message.content.object_id for message in exchange.messages}
    if len(ids) > 1:
        raise RoundError("the messages of one exchange must have the same content")


def _train_of(train: TrainConfig, config: Mapping[str, Scalar]) -> TrainConfig:
    changes = {_SETTINGS[key]: value for key, value in config.items() if key in _SETTINGS}
    merged = {**msgspec.to_builtins(train), **changes}
    try:
        return msgspec.convert(merged, TrainConfig)
    except msgspec.ValidationError as error:
        raise RoundError(f"the app's configuration cannot be used: {error}") from error


def _maker(
    message: Message, row: books.UpdateRow, update: StoredReplies | None, request: Request
) -> MakeReply:
    """Makes the reply when it is read: an update is decoded then, and not kept."""

    def make() -> Message:
        content = RecordDict()
        if update is not None:
            (reply,) = update
            params, buffers = request.params + reply.update, reply.buffers
            content["arrays"] = request.arrays.record(params, buffers, request.template)
        # Those that every reply has: Flower ends the run when one has a metric that another lacks.
        metrics = {name: row.metrics[name] for name in sorted(request.metrics & row.metrics.keys())}
        content["metrics"] = MetricRecord({**metrics, "num-examples": row.num_examples})
        return Message(content, reply_to=message)

    return make


def _error_maker(message: Message, error: Error) -> MakeReply:
    return lambda: Message(error, reply_to=message)
