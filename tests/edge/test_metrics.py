"""An agent's metrics: what a whole life of a device leaves in them, and where they can be read."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from edge_agent.settings import MetricsSettings
from edge_agent.vitals.metrics import EdgeMetrics
from edge_agent.vitals.metrics_board import REFRESH_SECONDS, MetricsBoard
from edge_agent.vitals.status import STATUS_NAME, read_status
from process.metrics import Registry
from tests.edge.lab import Lab, feed, windows
from wire.errors import DataError, TransportError
from wire.messages import Update


def metrics_of(lab: Lab, folder: Path) -> EdgeMetrics:
    agent = lab.agents[0]
    metrics = EdgeMetrics()
    metrics.read_from(agent.parts, lambda: agent.state, lambda: agent.rejected_total, folder)
    return metrics


def test_metrics_count_what_a_device_did(lab: Lab, tmp_path: Path) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    x, _ = windows(lab.bundle, 3)
    for window in x:
        agent.infer(window)
    with pytest.raises(DataError):
        agent.infer(np.full_like(x[0], np.nan))
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params))
    lab.cloud.broadcast()
    lab.cloud.order("dev-1")
    lab.run(3)
    values = metrics_of(lab, tmp_path).registry.values()
    (heard,) = lab.cloud.of(Update)
    assert isinstance(heard.body, Update)
    expected = {
        'shoal_edge_inferences_total{outcome="answered"}': 3,
        'shoal_edge_inferences_total{outcome="failed"}': 0,
        'shoal_edge_inferences_total{outcome="refused"}': 1,
        "shoal_edge_inference_seconds_count": 3,
        "shoal_edge_release_version": 1,
        'shoal_edge_swaps_total{cause="release"}': 1,
        'shoal_edge_swaps_total{cause="rollback"}': 0,
        'shoal_edge_samples{split="train"}': 32,
        'shoal_edge_samples{split="val"}': 8,
        'shoal_edge_jobs_total{kind="train",outcome="done"}': 1,
        'shoal_edge_jobs_total{kind="train",outcome="failed"}': 0,
        'shoal_edge_job_seconds_total{kind="train"}': lab.job_seconds,
        "shoal_edge_training_steps_total": heard.body.metrics["steps"],
        "shoal_edge_outbox_updates": 1,
        "shoal_edge_update_sends_total": 1,
        "shoal_edge_broker_connected": 1,
        "shoal_edge_broker_connections_total": 1,
        'shoal_edge_messages_dropped_total{direction="down"}': 0,
        "shoal_edge_clock_behind_seconds": 0,
    }
    assert {name: values[name] for name in expected} == expected
    assert values["shoal_edge_training_steps_total"] > 0
    assert values["shoal_edge_outbox_bytes"] > len(heard.body.payload)
    assert values["shoal_edge_disk_free_bytes"] > 0

    lab.cloud.receipt("dev-1", heard)
    lab.run(1)
    values = metrics_of(lab, tmp_path).registry.values()
    assert values['shoal_edge_updates_total{state="stored"}'] == 1
    assert values["shoal_edge_outbox_updates"] == values["shoal_edge_outbox_bytes"] == 0


def test_metrics_show_a_broker_that_is_away_and_a_clock_that_is_behind(lab: Lab, tmp_path: Path) -> None:
    lab.agent()
    lab.run(2)
    lab.broker.cut("dev-1", for_seconds=60.0)
    lab.settle()
    lab.time.wall_offset -= 3600
    values = metrics_of(lab, tmp_path).registry.values()
    assert values["shoal_edge_broker_connected"] == 0
    assert values["shoal_edge_clock_behind_seconds"] > 3000


def test_metrics_of_a_release_that_does_not_come_count_failed_checks(lab: Lab, tmp_path: Path) -> None:
    lab.agent(source=lambda path: None)
    lab.run(2)
    values = metrics_of(lab, tmp_path).registry.values()
    assert values['shoal_edge_jobs_total{kind="update",outcome="failed"}'] >= 1
    assert values["shoal_edge_release_version"] == 0


# ---- where they can be read ---------------------------------------------------------------------------------


def board_of(lab: Lab, folder: Path, **settings: str) -> MetricsBoard:
    return MetricsBoard(
        metrics_of(lab, folder), MetricsSettings(**settings), folder, lab.time, lab.agents[0].pulse
    )


def test_board_writes_a_text_file_and_refreshes_it_in_time(lab: Lab, tmp_path: Path) -> None:
    lab.agent()
    lab.run(2)
    board = board_of(lab, tmp_path, file="shoal.prom")
    board.refresh()
    text = (tmp_path / "shoal.prom").read_text()
    assert "# TYPE shoal_edge_inferences_total counter\n" in text
    assert 'shoal_edge_inferences_total{outcome="answered"} 0\n' in text
    lab.agents[0].infer(windows(lab.bundle, 1)[0][0])
    assert board.refresh()['shoal_edge_inferences_total{outcome="answered"}'] == 0
    lab.run(REFRESH_SECONDS)
    assert board.refresh()['shoal_edge_inferences_total{outcome="answered"}'] == 1
    assert 'outcome="answered"} 1\n' in (tmp_path / "shoal.prom").read_text()
    board.close()
    assert not (tmp_path / "shoal.prom").exists()


def test_board_without_settings_opens_no_port_and_writes_no_file(lab: Lab, tmp_path: Path) -> None:
    lab.agent()
    folder = tmp_path / "empty"
    folder.mkdir()
    board = board_of(lab, folder)
    board.open()
    board.refresh()
    assert (board.port, list(folder.iterdir())) == (0, [])
    board.close()


def test_board_answers_on_the_port_that_was_asked_for(lab: Lab, tmp_path: Path) -> None:
    lab.agent()
    lab.run(2)
    board = board_of(lab, tmp_path, listen="127.0.0.1:0")
    board.open()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{board.port}/metrics", timeout=30) as answer:
            assert b"\nshoal_edge_broker_connected 1\n" in answer.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{board.port}/healthz", timeout=30) as answer:
            assert answer.read() == b'{"status": "ok"}'
        other = board_of(lab, tmp_path, listen=f"127.0.0.1:{board.port}")
        with pytest.raises(TransportError, match="cannot listen"):
            other.open()
    finally:
        board.close()


def test_text_file_that_cannot_be_written_does_not_stop_the_agent(lab: Lab, tmp_path: Path) -> None:
    lab.agent()
    board = board_of(lab, tmp_path, file="missing/shoal.prom")
    assert board.refresh()["shoal_edge_broker_connected"] in (0, 1)
    board.close()


def test_status_of_a_stopped_agent_holds_its_last_metrics(lab: Lab, tmp_path: Path) -> None:
    agent = lab.agent(status_file=tmp_path / STATUS_NAME)
    lab.run(2)
    agent.infer(windows(lab.bundle, 1)[0][0])
    agent.stop()
    status = read_status(tmp_path)
    assert status is not None
    assert status["metrics"]['shoal_edge_inferences_total{outcome="answered"}'] == 1
    assert status["metrics"]["process_resident_memory_bytes"] > 0
    assert len(json.dumps(status)) < 16_384


def test_every_label_value_is_known_beforehand() -> None:
    metrics = EdgeMetrics()
    assert isinstance(metrics.registry, Registry)
    assert all(values for metric in metrics.registry.metrics() for values in metric.labels.values())
