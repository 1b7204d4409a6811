"""The record of one ServerApp: after a restart the app runs again from its start against it, and goes on where it ends.

Laws of the file: a step is kept before the app knows its answer; while there are recorded steps the app is told what it
was told before, in that order, and nobody else is asked; an app that asks something else is told so at once, with the
position, and is told nothing more; an app that returns before the record is at its end did not do the same either.

How often an app polls is no part of the record: `pull_messages` that brought nothing, and `get_node_ids` that said
again what it said before, are not kept. When an app is played back it gets what comes next as soon as it asks.
Source: docs/architecture.md (Who drives a run).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from cloud_server.db.grid_steps import BEGIN, GridStep
from wire.errors import RoundError

NODES, PUSH, PULL = "nodes", "push", "pull"
_SHOWN = 16
_DOES = {NODES: "asked who is there", PUSH: "sent messages", PULL: "took replies"}
_PARTS = {
    "type": "of another type",
    "count": "to another number of nodes",
    "nodes": "to other nodes",
    "arrays": "with other arrays",
    "config": "with another configuration",
}
_HINT = (
    "make the app do the same again (seed what it draws, ask no clock, do not change it within a run), give the run"
    " another name, or begin the app anew: shoal-cloud round anew"
)


class Tape:
    """What one app did, and what it does. Loaded before the app's thread starts, then of that thread only.

    Args:
        keep: makes a step durable.
        patience_seconds: as long may an app ask in vain for what the record does not give it.
        monotonic: seconds.
    """

    def __init__(
        self, keep: Callable[[GridStep], None], *, patience_seconds: float, monotonic: Callable[[], float]
    ) -> None:
        self._keep = keep
        self._patience_seconds = patience_seconds
        self._monotonic = monotonic
        self._steps: list[GridStep] = []
        self._done = 0
        self._nodes: tuple[int, ...] = ()
        self._has_nodes = False
        self._waits_since: float | None = None
        self.after = 0

    def load(self, steps: Sequence[GridStep]) -> None:
        """Takes what an earlier process kept."""
        self._steps, self._done = list(steps), 0
        self.after = int(steps[0].answer["after"]) if steps else 0

    def begin(self, seed: int) -> int:
        """What the app draws from: as before, or this seed (a run that comes out of a backup has another one).

        Raises:
            StorageError: the step cannot be kept.
        """
        if self.is_played:
            self._append(BEGIN, {}, {"after": self.after, "seed": seed})
            return seed
        first = self._steps[0]
        self._advance()
        return int(first.answer["seed"])

    @property
    def is_played(self) -> bool:
        """Whether the app is at the live edge: all that was recorded was asked again."""
        return self._done == len(self._steps)

    @property
    def position(self) -> int:
        """Of the step that comes next, from 1."""
        return self._done + 1

    # ---- who is there ----

    def told_nodes(self) -> tuple[int, ...] | None:
        """Who was there at this point; None at the live edge.

        Raises:
            RoundError: (app) it did something else.
        """
        if self.is_played:
            return None
        step = self._steps[self._done]
        if step.kind == NODES:
            self._nodes = tuple(step.answer["nodes"]) if "nodes" in step.answer else self._nodes
            self._has_nodes = True
            self._advance()
        elif self._has_nodes:
            self._wait_in_vain(step)
        else:
            raise self._diverged(step, _DOES[NODES])
        return self._nodes

    def keep_nodes(self, nodes: Sequence[int]) -> None:
        """At the live edge: who is there now, before the app is told."""
        found = tuple(nodes)
        if self._has_nodes and found == self._nodes:
            return
        is_same = found == self._nodes and any(step.kind == NODES for step in self._steps)
        self._append(NODES, {}, {} if is_same else {"nodes": list(found)})
        self._nodes, self._has_nodes = found, True

    # ---- messages ----

    def push(self, number: int, messages: Sequence[Message]) -> None:
        """The app sends messages: the same as before, or new ones at the live edge.

        Raises:
            RoundError: (app) it did something else.
        """
        asked = {"exchange": number, **describe(messages)}
        self._has_nodes = False
        if self.is_played:
            self._append(PUSH, asked, {})
            return
        step = self._steps[self._done]
        if step.kind != PUSH:
            raise self._diverged(step, _DOES[PUSH])
        if step.asked != asked:
            other = [said for part, said in _PARTS.items() if step.asked.get(part) != asked[part]]
            raise self._diverged(step, f"{_DOES[PUSH]} {', '.join(other) or 'out of turn'}")
        self._advance()

    def told_pull(
        self, message_ids: Sequence[str], *, is_waiting: bool = False
    ) -> list[tuple[str, str]] | None:
        """What the app was given when it asked for replies here: (id of the message, name of the reply) of each, none
        where it was given none; None at the live edge.

        Args:
            is_waiting: the app asks for a reply to each.

        Raises:
            RoundError: (app) it asks for others; or what was said then: the messages could not be sent.
        """
        if self.is_played:
            return None
        step = self._steps[self._done]
        if step.kind != PULL:
            if is_waiting:
                raise self._diverged(step, "waits for replies")
            self._wait_in_vain(step)
            return []
        given = [(str(message_id), str(name)) for message_id, name in step.answer.get("replies", ())]
        known = {message_id for message_id, _ in given}
        is_refused = "error" in step.answer
        if not known <= set(message_ids) or (is_waiting and not is_refused and len(given) < len(message_ids)):
            raise self._diverged(step, "asked for replies to other messages")
        self._advance()
        if is_refused:
            raise RoundError(str(step.answer["error"]))
        return given

    def keep_pull(self, replies: Iterable[tuple[str, str]]) -> None:
        """At the live edge: which replies come now (id of the message, name of the reply), before the app has them."""
        listed = [list(each) for each in replies]
        if listed:
            self._append(PULL, {}, {"replies": listed})

    def keep_refusal(self, reason: str) -> None:
        """At the live edge: messages that cannot be sent, before the app is told."""
        self._append(PULL, {}, {"error": reason})

    # ---- the end ----

    def check_end(self) -> None:
        """The app returned.

        Raises:
            RoundError: (app) before it did all that it had done.
        """
        if not self.is_played:
            raise self._diverged(self._steps[self._done], "returned")

    # ---- inside ----

    def _append(self, kind: str, asked: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        step = GridStep(position=self.position, kind=kind, asked=asked, answer=answer)
        self._keep(step)
        # What was sent and given is in the books; here it is only counted.
        self._steps.append(GridStep(position=step.position, kind=kind))
        self._advance()

    def _advance(self) -> None:
        self._done += 1
        self._waits_since = None

    def _wait_in_vain(self, step: GridStep) -> None:
        """The app polls where the record has something else: one that waited for a clock then will go on by itself."""
        now = self._monotonic()
        if self._waits_since is None:
            self._waits_since = now
        elif now - self._waits_since > self._patience_seconds:
            raise self._diverged(step, f"waits for more than {self._patience_seconds:.0f} s")

    def _diverged(self, step: GridStep, now: str) -> RoundError:
        before = _DOES.get(step.kind, step.kind)
        if step.kind == PUSH:
            before += f" (exchange {step.asked.get('exchange')}, {step.asked.get('type')})"
        return RoundError(
            f"the app does not do what it did before the restart: at step {step.position} of"
            f" {len(self._steps)} it {before}, and now it {now}",
            hint=_HINT,
            position=step.position,
            steps=len(self._steps),
        )


def describe(messages: Sequence[Message]) -> dict[str, Any]:
    """What decides what devices are told by messages, part by part, so that a difference can be named."""
    nodes = [message.metadata.dst_node_id for message in messages]
    types = sorted({message.metadata.message_type for message in messages})
    arrays, config = hashlib.sha256(), hashlib.sha256()
    known: dict[int, tuple[str, str]] = {}
    for message in messages:
        content = message.content
        # Flower's strategies send one content to all.
        if id(content) not in known:
            known[id(content)] = _digests(content)
        of_arrays, of_config = known[id(content)]
        arrays.update(of_arrays.encode())
        config.update(f"{message.metadata.group_id}\0{of_config}".encode())
    return {
        "type": " ".join(types),
        "count": len(nodes),
        "nodes": _short(hashlib.sha256(json.dumps(nodes).encode())),
        "arrays": _short(arrays),
        "config": _short(config),
    }


def _digests(content: RecordDict) -> tuple[str, str]:
    """Of a content's arrays, and of all else in it."""
    arrays, rest = hashlib.sha256(), hashlib.sha256()
    for name in sorted(content):
        record = content[name]
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                arrays.update(f"{name}\0{key}\0{array.dtype}\0{array.shape}\0".encode())
                arrays.update(array.numpy().tobytes())
        elif isinstance(record, ConfigRecord | MetricRecord):
            rest.update(repr((name, type(record).__name__, sorted(record.items()))).encode())
    return arrays.hexdigest(), rest.hexdigest()


def _short(digest: hashlib._Hash) -> str:
    return digest.hexdigest()[: 2 * _SHOWN]
