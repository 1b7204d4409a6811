"""A receipt that arrives while the disk is full: the update is still owed, and ends when the receipt is said again."""

from __future__ import annotations

import sqlite3
from typing import Any

from edge_agent.release.memory_slots import MemorySlots
from edge_agent.store.storage import open_database
from tests.edge.lab import Lab, feed
from wire.messages import Update


class FullConnection(sqlite3.Connection):
    """Refuses commits that end an update, as often as it is told to."""

    refusals = 0
    ends_update = False

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql.startswith("UPDATE outbox"):
            self.ends_update = True
        if sql == "COMMIT" and self.ends_update:
            self.ends_update = False
            if FullConnection.refusals:
                FullConnection.refusals -= 1
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
        return super().execute(sql, parameters)


def test_update_whose_end_did_not_reach_the_disk_is_sent_again(lab: Lab, tmp_path: Any) -> None:
    database = open_database(tmp_path, clock=lab.time, connect=FullConnection)
    agent = lab.agent(database=database, slots=MemorySlots(lab.shared))
    lab.run(30)
    feed(agent, lab.bundle, 20)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params), seconds=600)
    lab.cloud.broadcast()
    lab.cloud.order("dev-1")
    lab.run(30)
    heard = lab.cloud.of(Update)
    FullConnection.refusals = 1
    lab.cloud.receipt("dev-1", heard[-1])
    lab.run(1)
    assert FullConnection.refusals == 0
    assert agent.parts.outbox.depth() == 1
    sent = len(lab.cloud.of(Update))
    lab.run(600)
    assert len(lab.cloud.of(Update)) > sent, "what is owed is sent again"
    lab.cloud.receipt("dev-1", lab.cloud.of(Update)[-1])
    lab.run(1)
    assert agent.parts.outbox.depth() == 0
    assert agent.parts.outbox.totals()["stored"] == 1
