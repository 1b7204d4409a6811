"""What every round has in common in which the cloud learns a sum and no single update, however that is brought about.

Laws of the file: no single update is ever decoded, weighed or measured here, and the strategy sees one reply, the mean.
Source: docs/protocol.md, clauses 13 and 15.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from cloud_server.db import rounds as books
from cloud_server.privacy.distributed import noise_terms
from cloud_server.rounds import events as ev
from cloud_server.rounds.intake import Intake
from cloud_server.rounds.performer import Performer
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.ports import Reply, Vector
from cloud_server.rounds.state import Phase, RoundState
from cloud_server.screening import Expected
from wire.errors import ConfigurationError, QuorumError, RoundError
from wire.lattice import noisy_mean
from wire.mask_terms import NoiseTerms, RingName, RingTerms
from wire.messages import Update, decode_body
from wire.norm import l2_norm
from wire.ring import Ring, RingVector, choose_ring, decode_mean, ring_of, value_bits_of

ENVELOPE_BYTES = 64 * 1024
"""Of a slot, for all that is not the payload."""


class SummedPerformer(Performer, ABC):
    """Drives a run by a strategy that sees means only.

    Raises:
        ConfigurationError: (operator) a model with buffers, whose statistics no mask hides.
    """

    _terms: ClassVar[str]
    """What a round's configuration has its terms under; a round without them is not one of this policy."""
    _closed: ClassVar[str]
    """The state of a round whose updates are all here."""

    def __init__(self, plan: RunPlan, ports: RunPorts, intake: Intake) -> None:
        super().__init__(plan, ports, intake)
        if plan.manifest.buffers_size:
            raise ConfigurationError(
                "secure aggregation does not cover the model's buffers (BatchNorm statistics)",
                hint="use a model with GroupNorm",
            )

    def _committed_norm(self) -> dict[str, float]:
        """Nobody knows how long single updates are."""
        return {}

    def _measured_norm(self, number: int) -> dict[str, float]:
        return {}

    def _terms_for(self, members: int, *, dropout: float, colluding: float) -> tuple[Ring, NoiseTerms | None]:
        """The ring of a sum, and each device's noise on it; None where devices add none.

        Raises:
            QuorumError: so few devices, or so many, that the noise does not fit.
        """
        budget, size, clip = (
            self._ports.budget,
            self._plan.manifest.params_size,
            self._plan.train.clipping_norm,
        )
        if budget is None:
            return choose_ring(members, size, clip), None
        plan = budget.plan
        try:
            noise = noise_terms(
                members=members,
                dropout=dropout,
                colluding=colluding,
                clipping_norm=plan.clipping_norm,
                noise_multiplier=plan.noise_multiplier,
                size=size,
            )
        except ConfigurationError as error:
            raise QuorumError(f"{error} ({error.hint})", present=members) from error
        return Ring(32, value_bits_of(32, members), plan.clipping_norm), noise

    def _mean(self, total: RingVector, terms: RingTerms, count: int) -> Vector:
        """The mean of `count` updates, from their sum.

        Raises:
            RoundError: the noise of so few devices is not enough.
        """
        noise = terms.noise
        if noise is None:
            return decode_mean(total, ring_of(terms), count)
        if count < noise.quorum:
            raise RoundError(f"{count} devices delivered, the noise is that of {noise.quorum}", count=count)
        return noisy_mean(total, noise, count)

    @abstractmethod
    def _ring(self) -> RingName | None:
        """The ring of the round under way; None where there is none."""

    def _expected(self, order: books.OrderRow) -> Expected:
        """A masked update has one size, one weight, and nothing that could be read."""
        expected, ring = super()._expected(order), self._ring()
        if order.kind != "train" or ring is None:
            return expected
        return replace(expected, codecs=frozenset({ring}), max_examples=1)

    def _close_collection(self, action: ev.CloseCollection) -> None:
        """Commits whose updates count; what unmasks them is asked for after that."""
        row, now, run = self._open_row(), self._ports.clock.now(), self._plan.run
        if row.state != "training":
            super()._close_collection(action)
            return
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.expire_orders(connection, run, row.number, "train", now)
            books.update_round(connection, run, row.number, state=self._closed)
            stored = books.load_updates(connection, run, row.number, "train")
        self._round = replace(row, state=self._closed)
        self._intake.close()
        self._closed_with(stored)

    def _closed_with(self, stored: Sequence[books.UpdateRow]) -> None:
        """What a policy does with whose updates count."""

    def _stored_updates(
        self, number: int, devices: Container[str] | None = None
    ) -> Iterator[tuple[books.UpdateRow, Update]]:
        """The masked updates of a round, one in memory at a time, in the order of their ids.

        Args:
            devices: only of these.
        """
        for row in self._stored_rows(number):
            if devices is None or row.device in devices:
                yield row, self._stored_update(row)

    def _stored_rows(self, number: int) -> list[books.UpdateRow]:
        with self._database.read() as connection:
            return books.load_updates(connection, self._plan.run, number, "train")

    def _discard(self, rows: Sequence[books.UpdateRow], reason: str) -> None:
        """Ends updates that cannot be part of the sum."""
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.discard_updates(connection, [row.update_id for row in rows], reason)
        self._forget(row.artefact_key for row in rows)

    def _stored_update(self, row: books.UpdateRow) -> Update:
        if row.artefact_key:
            body = self._ports.blobs.get_blob(row.artefact_key)
        else:
            with self._database.read() as connection:
                body = books.load_body(connection, row.update_id)
        if hashlib.sha256(body).digest() != row.body_sha256:
            raise RoundError("a stored update is damaged", update_id=row.update_id.hex())
        return decode_body(body, Update)

    def restore(self, row: books.RunRow) -> RoundState:
        """See `Performer.restore`; a round that was opened under another policy is left behind."""
        state = super().restore(row)
        if self._round is not None and self._terms not in self._round.config:
            self._end_round()
            return replace(state, phase=Phase.IDLE)
        return state


class SummedReplies:
    """The mean of a round as the one reply that it is; its length is the number of devices in it."""

    def __init__(self, mean: Any, devices: int) -> None:
        self._mean, self._devices = mean, devices

    def __len__(self) -> int:
        return self._devices

    def __iter__(self) -> Iterator[Reply]:
        no_metrics: Mapping[str, float] = {}
        yield Reply(
            node_id=0,
            num_examples=self._devices,
            metrics=no_metrics,
            update=self._mean.copy(),
            buffers=np.zeros(0, np.float32),
            norm=l2_norm(self._mean),
        )
