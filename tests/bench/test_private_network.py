"""A measurement in its own network namespace: only its bytes are counted; without one, the rows say so."""

from __future__ import annotations

import pytest

from bench.private_network import in_private_network

SIZE = 100_000
MODULE = "tests.bench.loopback_rows"


def test_private_network_counts_the_bytes_of_the_measurement() -> None:
    (row,) = in_private_network(MODULE, "sent_over_loopback", [SIZE])
    assert row.note.startswith(f"{SIZE} received")
    assert row.value >= SIZE
    if "common loopback" not in row.note:
        assert row.value < 1.2 * SIZE


def test_common_loopback_is_named_where_no_namespace_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    (row,) = in_private_network(MODULE, "sent_over_loopback", [SIZE])
    assert row.value >= SIZE
    assert row.note.endswith("others' bytes included")
