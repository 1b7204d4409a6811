"""The committed replies of a round, read back from the store one at a time.

Laws of the file: the order is that of the update ids, whatever the order of arrival; each pass holds one
reply, decoded anew unless it was kept since it was screened; what is read back is checked against the digest
that was committed with it; a reply weighs what was committed, however its numbers came here, and of a stale one the
same part of its step counts each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cloud_server.db import rounds as books
from cloud_server.db.engine import Database
from cloud_server.rounds.kept import KeptUpdates
from cloud_server.rounds.ports import Blobs, Reply
from cloud_server.screening import Expected, Screened, decode_update
from wire.errors import RoundError
from wire.messages import Update, decode_body


class StoredReplies:
    """The stored updates of one round.

    Args:
        rows: from `load_updates`, in the canonical order.
        expected: what each order asked for, by order id.
        node_ids: device → node id.
        factors: what of a stale update's step counts, by update id; 1 for whoever is not there.
        kept: updates that this process has decoded already; the first pass takes them out.
    """

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        rows: Sequence[books.UpdateRow],
        expected: Mapping[bytes, Expected],
        node_ids: Mapping[str, int],
        kept: KeptUpdates | None = None,
        factors: Mapping[bytes, float] | None = None,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._rows = rows
        self._expected = expected
        self._node_ids = node_ids
        self._kept = KeptUpdates() if kept is None else kept
        self._factors = factors or {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Reply]:
        """Yields each reply.

        Raises:
            RoundError: (disk) the bytes of a reply are not those that were committed.
        """
        for row in self._rows:
            yield self._reply(row)

    def _reply(self, row: books.UpdateRow) -> Reply:
        screened = self._kept.take(row.update_id) or self._read(row)
        factor = self._factors.get(row.update_id, 1.0)
        return Reply(
            node_id=self._node_ids[row.device],
            num_examples=row.num_examples,
            metrics=row.metrics,
            update=screened.update if factor == 1.0 else screened.update * np.float32(factor),
            buffers=screened.buffers,
            norm=screened.norm,
        )

    def _read(self, row: books.UpdateRow) -> Screened:
        if row.artefact_key:
            body = self._blobs.get_blob(row.artefact_key)
        else:
            with self._database.read() as connection:
                body = books.load_body(connection, row.update_id)
        if hashlib.sha256(body).digest() != row.body_sha256:
            raise RoundError("a stored update is damaged", update_id=row.update_id.hex())
        screened = decode_update(decode_body(body, Update), self._expected[row.order_id])
        if not isinstance(screened, Screened):
            raise RoundError("a stored update does not decode any more", update_id=row.update_id.hex())
        return screened
