"""Light agents on real connections: everything that they make is stored once, and everybody learns of it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from cloud_server.db.rounds import UpdateRow
from fleet.load.campaign import MARKER, LoadPlan, run_load
from fleet.load.ledger import LedgerFile, Line, Verdict, compare, read_lines
from fleet.load.light_agent import Habits
from fleet.load.open_files import allow_open_files
from fleet.load.report import LoadReport, render
from fleet.out_folder import make_empty
from models.bundle import Bundle
from tests.fleet.thirds import make_federation
from tests.transport.conftest import needs_mosquitto
from wire.errors import ConfigurationError

A, B, C = (bytes([number]) * 16 for number in (1, 2, 3))
BODY, OTHER = bytes(32), bytes([1]) * 32


def row(update: bytes, *, order: bytes = b"", state: str = "folded", body: bytes = BODY) -> UpdateRow:
    return UpdateRow(
        update_id=update,
        order_id=order or update,
        round_number=1,
        device="d",
        kind="train",
        state=state,
        body_sha256=body,
        reason="" if state == "folded" else "wrong_base",
    )


def books(*, receipts: tuple[bytes, ...] = (A, B)) -> list[Line]:
    """Two updates that were made, and who of them got a receipt."""
    made = [Line(update.hex(), "d", update.hex(), BODY.hex()) for update in (A, B)]
    return [*made, *(Line(update.hex(), verdict="stored") for update in receipts)]


def test_ledger_agrees_with_rows_that_are_all_there() -> None:
    assert compare(books(), [row(A), row(B)]) == Verdict(made=2, receipts=2, stored=2)
    assert compare(books(), [row(A), row(B)]).is_good


@pytest.mark.parametrize(
    ("lines", "rows", "wrong"),
    [
        (books(), [row(A)], {"lost": 1}),
        (books(receipts=(A,)), [row(A)], {"owed": 1}),
        (books(), [row(A), row(B), row(C, order=A)], {"doubled": 1, "unknown": 1}),
        (books(), [row(A), row(B, body=OTHER)], {"altered": 1}),
        (books(), [row(A), row(B), row(C)], {"unknown": 1}),
        (books(receipts=(A,)), [row(A), row(B, state="refused")], {"refused": {"wrong_base": 1}}),
        (books(receipts=(A,)), [row(A), row(B)], {"receipts": 1}),
    ],
)
def test_ledger_finds_what_is_wrong(
    lines: list[Line], rows: list[UpdateRow], wrong: dict[str, object]
) -> None:
    verdict = compare(lines, rows)
    assert not verdict.is_good
    assert {name: getattr(verdict, name) for name in wrong} == wrong


def test_ledger_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path / "ledger")
    ledger.made("d", A, A, BODY)
    ledger.ended(A, "duplicate", "")
    ledger.close()
    assert compare(read_lines([tmp_path / "ledger"]), [row(A)]).is_good


def test_too_few_open_files_are_an_error_that_says_how_to_get_more() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        pytest.skip("this system has no limit")
    with pytest.raises(ConfigurationError) as caught:
        allow_open_files(hard)
    assert "ulimit -Hn" in caught.value.hint


def test_folder_of_somebody_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(ConfigurationError):
        make_empty(tmp_path, MARKER, "load")
    assert (tmp_path / "precious").exists()
    (tmp_path / MARKER).touch()
    make_empty(tmp_path, MARKER, "load")
    assert [path.name for path in tmp_path.iterdir()] == [MARKER]
    with pytest.raises(ConfigurationError):
        make_empty(tmp_path / MARKER, MARKER, "load")
    assert (tmp_path / MARKER).is_file()


def play(out: Path, bundle: Bundle, *, devices: int, cut_every: int, is_tls: bool = True) -> LoadReport:
    make_empty(out, MARKER, "load")
    plan = LoadPlan(
        devices=devices,
        seconds=0.0,
        is_tls=is_tls,
        fetch_every=devices // 2,
        cut_every=cut_every,
        habits=Habits(heartbeat_seconds=10.0, receipt_seconds=5.0, receipt_first=1.0, spread_seconds=0.1),
    )
    return run_load(plan, out, bundle, make_federation())


def check(report: LoadReport, *, devices: int, cut: int) -> None:
    assert report.is_good, render(report)
    assert report.books == Verdict(made=devices, receipts=devices, stored=devices)
    assert report.folded == devices
    # Two devices, two releases.
    assert report.fetched == 4
    assert report.reconnects >= cut
    assert report.dropped == 0
    # What was in flight when a connection broke travels again.
    assert set(report.refused) <= {"replayed"}


@pytest.mark.parametrize("is_tls", [pytest.param(True, marks=needs_mosquitto)])
def test_fleet_of_light_agents_makes_a_round_and_takes_a_release(
    tmp_path: Path, thirds_bundle: Bundle, is_tls: bool
) -> None:
    """Some of them lose their connection right after they sent their update."""
    report = play(tmp_path / "load", thirds_bundle, devices=50, cut_every=10, is_tls=is_tls)
    check(report, devices=50, cut=5)


@pytest.mark.slow
@pytest.mark.parametrize("is_tls", [pytest.param(each, marks=needs_mosquitto) for each in (True, False)])
def test_larger_fleet_whose_connections_break_loses_and_doubles_nothing(
    tmp_path: Path, thirds_bundle: Bundle, is_tls: bool
) -> None:
    report = play(tmp_path / "load", thirds_bundle, devices=500, cut_every=5, is_tls=is_tls)
    check(report, devices=500, cut=100)
