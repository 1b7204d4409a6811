"""Heads as patches: base + decoded difference, what was left out is owed, and both survive the end of a process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic import command
from alembic.config import Config

from cloud_server.db import schema
from cloud_server.db.engine import open_database
from cloud_server.db.rounds import HeadRow, load_head_row
from tests.cloud.round_lab import BlownFuseError, Device, Lab, Message
from wire.checkpoint import Checkpoint
from wire.codec import decode
from wire.errors import StorageError
from wire.messages import Invitation, Order
from wire.patch import apply_patch
from wire.primitives import sha256


def patched(lab: Lab, data: bytes) -> Checkpoint:
    """What a device makes of a patch that was broadcast."""
    invitation = next(
        one for one in lab.invitations if one.patch is not None and one.patch.blob.sha256 == sha256(data)
    )
    assert invitation.patch is not None
    head = apply_patch(lab.head(invitation.patch.base_sha256), data)
    assert head.sha256 == invitation.head.sha256
    return head


@pytest.mark.parametrize("codec", ["dithered", "int4", "int8", "int2"])
def test_every_head_is_its_base_and_a_patch_and_no_head_is_broadcast_whole(codec: str) -> None:
    lab = Lab(4, rounds=4, patch_codec=codec)
    last = lab.run()
    heads = [patched(lab, data) for data in lab.broadcast]
    assert len(heads) == 4
    assert heads[-1] == last
    assert all(one.head_on_need for one in lab.invitations if one.open)
    assert [one.patch is None for one in opened(lab)] == [
        one.round_number == 1 and one is lab.invitations[0] for one in opened(lab)
    ]


def opened(lab: Lab) -> list[Invitation]:
    return [one for one in lab.invitations if one.open]


def test_first_head_is_the_release_and_leaves_on_need_only() -> None:
    lab = Lab(3, rounds=1, patch_codec="dithered")
    lab.runner.tick()
    (invitation,) = lab.invitations
    assert invitation.head.sha256 == lab.initial.sha256
    assert (invitation.head_on_need, invitation.patch, lab.broadcast) == (True, None, [])


def test_exact_heads_are_broadcast_whole() -> None:
    lab = Lab(3, rounds=2)
    lab.run()
    assert {sha256(data) for data in lab.broadcast} == {one.head.sha256 for one in opened(lab)[1:]}
    assert [one.head_on_need for one in opened(lab)] == [True, False, False, False]
    assert all(one.patch is None for one in lab.invitations)


def test_patch_that_is_not_smaller_than_the_head_is_not_offered() -> None:
    coded, exact = Lab(3, rounds=2, patch_codec="fp32"), Lab(3, rounds=2)
    assert coded.run().sha256 == exact.run().sha256
    assert all(one.patch is None for one in coded.invitations)
    assert {row.residual_key for row in coded.rows(schema.checkpoints)} == {None}


@pytest.mark.parametrize("codec", ["dithered", "int2"])
def test_what_patches_leave_out_is_exactly_what_is_owed(codec: str) -> None:
    """Exact rounds from the same updates would be where the head is and what is owed."""
    lab = Lab(4, rounds=12, patch_codec=codec)
    lab.run()
    rows = sorted(lab.rows(schema.checkpoints), key=lambda row: row.round)
    true, longest = lab.initial.params.astype(np.float64), 0.0
    for before, row in pairwise(rows):
        base = bytes.fromhex(before.sha256)
        true = true + mean_update(lab, row.round, base)
        step = lab.head(bytes.fromhex(row.sha256)).params - lab.head(base).params
        longest = max(longest, float(np.linalg.norm(step)))
    owed = np.frombuffer(lab.blobs.get_blob(rows[-1].residual_key), "<f4")
    np.testing.assert_allclose(true - lab.runner.head.params, owed, rtol=0, atol=1e-5)
    assert 0 < np.linalg.norm(owed) < longest


def mean_update(lab: Lab, number: int, base: bytes) -> Any:
    orders = {
        name: order for name, order in lab.orders if (order.kind, order.round_number) == ("train", number)
    }
    assert all(order.head_sha256 == base for order in orders.values())
    updates = [lab.devices[name].update(order) for name, order in orders.items()]
    vectors = [decode(one.payload, one.codec, one.params_size).astype(np.float64) for one in updates]
    weights = np.array([one.num_examples for one in updates], np.float64)
    return np.average(vectors, axis=0, weights=weights)


def test_same_seed_gives_the_same_patches() -> None:
    one, two = Lab(4, rounds=3, patch_codec="dithered"), Lab(4, rounds=3, patch_codec="dithered")
    assert one.run().sha256 == two.run().sha256
    assert one.broadcast == two.broadcast


@pytest.mark.parametrize("codec", ["dithered", "int8"])
def test_restart_between_rounds_keeps_what_is_owed(codec: str) -> None:
    calm, restless = (Lab(4, rounds=6, patch_codec=codec) for _ in range(2))
    expected = calm.run()
    for _ in range(500):
        if restless.runner.is_finished:
            break
        restless.restart()
        restless.step()
    assert restless.runner.head.sha256 == expected.sha256


def test_process_that_ends_at_any_step_gives_the_same_head() -> None:
    calm = Lab(3, rounds=3, patch_codec="dithered")
    expected, steps = calm.run(), len(calm.fuse.steps)
    for at in range(0, steps, 3):
        lab = Lab(3, rounds=3, patch_codec="dithered")
        burned = len(lab.fuse.steps)
        lab.fuse.at = burned + at
        try:
            lab.run()
        except BlownFuseError:
            lab.fuse.at = -1
            lab.restart()
            lab.run()
        assert lab.runner.head.sha256 == expected.sha256, f"ended at step {at}"


def test_only_the_newest_patch_and_residual_are_kept() -> None:
    lab = Lab(3, rounds=4, patch_codec="dithered")
    lab.run()
    rows = lab.rows(schema.checkpoints)
    newest = max(rows, key=lambda row: row.round)
    assert [row.round for row in rows if row.patch_key] == [newest.round]
    kept = {key.rsplit("/", 1)[1] for key in lab.blobs.keys("blobs")}
    assert kept == {row.sha256 for row in rows} | {newest.patch_key, newest.residual_key}


def test_failed_round_leaves_what_is_owed_as_it_was() -> None:
    lab = Lab(3, rounds=2, quorum=3, patch_codec="dithered")

    def silent(device: Device, order: Order) -> Message | None:
        return None if order.round_number == 2 else device.honest(order)

    lab.devices["d01"].behaviour = silent
    lab.run()
    assert [row.state for row in lab.rows(schema.rounds)] == ["done", "failed", "done"]
    # Every round asks twice of its cohort: to train on the head before, and to evaluate its own.
    heads = [(one.round_number, one.head.sha256, one.patch) for one in opened(lab)]
    after_first = heads[1]
    assert {(sha, patch) for number, sha, patch in heads if number == 2} == {after_first[1:]}
    calm = Lab(3, rounds=2, patch_codec="dithered")
    calm.run()
    assert opened(calm)[1].patch == after_first[2]
    assert patched(lab, lab.broadcast[-1]) == lab.runner.head


def test_residual_that_is_damaged_on_the_disk_is_a_storage_error() -> None:
    lab = Lab(3, rounds=2, patch_codec="dithered")
    while not lab.runner.view().moved:
        lab.step()
    (row,) = (row for row in lab.rows(schema.checkpoints) if row.residual_key)
    lab.blobs.delete_blob(row.residual_key)
    with pytest.raises(StorageError):
        lab.restart()


def test_database_of_the_version_before_keeps_its_head() -> None:
    database = open_database("sqlite://")
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).with_name("migrations")))
    rows = (
        "INSERT INTO models VALUES ('aa', 'lab', '', 'bb', 1.0)",
        "INSERT INTO runs VALUES ('spring', 1.0, 'aa', '{}', 7, 'active')",
        "INSERT INTO checkpoints VALUES ('spring', 3, 'abcd', 'abcd', 1.0)",
    )
    with database.transaction() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for row in rows:
            connection.exec_driver_sql(row)
    database.migrate()
    with database.read() as connection:
        assert load_head_row(connection, "spring") == HeadRow(round_number=3, sha256=b"\xab\xcd")
