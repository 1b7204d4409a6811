"""Metrics: the text that Prometheus reads, closed label sets, threads, and the port that shows them."""

from __future__ import annotations

import http.client
import socket
import threading

import pytest

from process.metrics import CONTENT_TYPE, Observed, Registry
from process.metrics_port import MetricsPort, parse_listen
from process.vitals import register_vitals
from wire.errors import ConfigurationError, StorageError, TransportError


def test_exposition_is_what_prometheus_reads() -> None:
    registry = Registry()
    rounds = registry.counter(
        "shoal_rounds_total",
        "Rounds by outcome.\nTwo lines.",
        "See them.",
        {"outcome": ["done", 'odd "name"\\\n']},
    )
    rounds.add(outcome="done")
    rounds.add(2, outcome='odd "name"\\\n')
    registry.gauge("shoal_devices", "Present.", "See them.").set(16)
    seconds = registry.histogram("shoal_round_seconds", "Duration.", "See it.", buckets=[0.1, 1, 10])
    for value in (0.05, 0.1, 0.5, 99):
        seconds.observe(value)
    assert registry.render() == (
        "# HELP shoal_devices Present.\n"
        "# TYPE shoal_devices gauge\n"
        "shoal_devices 16\n"
        "# HELP shoal_round_seconds Duration.\n"
        "# TYPE shoal_round_seconds histogram\n"
        'shoal_round_seconds_bucket{le="0.1"} 2\n'
        'shoal_round_seconds_bucket{le="1"} 3\n'
        'shoal_round_seconds_bucket{le="10"} 3\n'
        'shoal_round_seconds_bucket{le="+Inf"} 4\n'
        "shoal_round_seconds_sum 99.65\n"
        "shoal_round_seconds_count 4\n"
        "# HELP shoal_rounds_total Rounds by outcome.\\nTwo lines.\n"
        "# TYPE shoal_rounds_total counter\n"
        'shoal_rounds_total{outcome="done"} 1\n'
        'shoal_rounds_total{outcome="odd \\"name\\"\\\\\\n"} 2\n'
    )


def test_every_series_of_a_counter_is_there_before_anything_was_counted() -> None:
    registry = Registry()
    assert registry.render() == ""
    registry.counter("x_total", "X.", "See it.")
    registry.counter("y_total", "Y.", "See it.", {"a": ["1", "2"], "b": ["3"]})
    registry.histogram("z_seconds", "Z.", "See it.", {"step": ["fold"]}, buckets=[1])
    assert registry.values() == {
        "x_total": 0,
        'y_total{a="1",b="3"}': 0,
        'y_total{a="2",b="3"}': 0,
        'z_seconds_bucket{step="fold",le="1"}': 0,
        'z_seconds_bucket{step="fold",le="+Inf"}': 0,
        'z_seconds_sum{step="fold"}': 0,
        'z_seconds_count{step="fold"}': 0,
    }


def test_values_that_were_not_declared_are_counted_together() -> None:
    registry = Registry()
    counter = registry.counter("x_total", "X.", "See it.", {"reason": ["known"]})
    for number in range(100):
        counter.add(reason=f"made-up-{number}")
    counter.add(reason="known")
    assert [counter.value(reason=name) for name in ("known", "other", "made-up-1")] == [1, 100, 100]
    assert len(counter.samples()) == 2
    counter.read_from(lambda: {"known": 3.0, "this": 4.0, "that": 5.0})
    assert registry.values() == {'x_total{reason="known"}': 3, 'x_total{reason="other"}': 9}


def test_metrics_read_what_others_keep() -> None:
    registry = Registry()
    registry.gauge("live_bytes", "L.", "See it.").read_from(lambda: 1.5)
    registry.gauge("unknown_bytes", "U.", "See it.").read_from(lambda: None)
    pairs = registry.gauge("pairs", "P.", "See it.", {"a": ["x", "y"], "b": ["z"]})
    pairs.read_from(lambda: {("x", "z"): 2.0})
    registry.histogram("h_seconds", "H.", "See it.", buckets=[1, 2]).read_from(
        lambda: Observed([1, 0, 2], 9.5)
    )
    assert registry.values() == {
        "live_bytes": 1.5,
        'pairs{a="x",b="z"}': 2,
        'pairs{a="y",b="z"}': 0,
        'h_seconds_bucket{le="1"}': 1,
        'h_seconds_bucket{le="2"}': 1,
        'h_seconds_bucket{le="+Inf"}': 3,
        "h_seconds_sum": 9.5,
        "h_seconds_count": 3,
    }


def test_a_book_that_cannot_be_read_hides_nothing_else() -> None:
    def broken() -> float:
        raise StorageError("the database failed")

    registry = Registry()
    registry.gauge("a_bytes", "A.", "See it.").read_from(broken)
    registry.gauge("b_bytes", "B.", "See it.").set(2)
    assert registry.values() == {"b_bytes": 2}


def test_additions_from_many_threads_are_all_counted() -> None:
    counter = Registry().counter("x_total", "X.", "See it.", {"worker": ["same"]})

    def work() -> None:
        for _ in range(2_000):
            counter.add(worker="same")

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counter.value(worker="same") == 16_000


def test_misuse_is_an_error() -> None:
    registry = Registry()
    counter = registry.counter("x_total", "X.", "See it.", {"a": ["b"]})
    labelled = registry.histogram("h_seconds", "H.", "See it.", {"a": ["b"]})
    for call in (
        lambda: registry.counter("x_total", "again", "See it."),
        lambda: registry.counter("x", "does not end in _total", "See it."),
        lambda: registry.gauge("Bad-Name", "X.", "See it."),
        lambda: registry.histogram("g_seconds", "X.", "See it.", buckets=[2, 1]),
        lambda: labelled.read_from(lambda: Observed([], 0.0)),
        lambda: counter.add(-1, a="b"),
        lambda: counter.add(b="c"),
        lambda: counter.add(),
    ):
        with pytest.raises(ConfigurationError):
            call()


# ---- the port ----------------------------------------------------------------------------------------------


def test_port_shows_the_metrics_and_nothing_else() -> None:
    registry = Registry()
    register_vitals(registry, started=1.0)
    with MetricsPort(registry, "127.0.0.1:0") as port:
        connection = http.client.HTTPConnection("127.0.0.1", port.port, timeout=30)
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read().decode()
        assert (answer.status, answer.getheader("Content-Type")) == (200, CONTENT_TYPE)
        assert "process_start_time_seconds 1\n" in text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values["process_resident_memory_bytes"]) > 1e6
        for method, path, status in (("GET", "/", 404), ("POST", "/metrics", 501)):
            connection.request(method, path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()


def test_port_survives_a_reader_that_sends_nothing_sensible() -> None:
    with MetricsPort(Registry(), "127.0.0.1:0") as port:
        with socket.create_connection(("127.0.0.1", port.port), timeout=30) as rude:
            rude.sendall(b"\x16\x03\x01\x02\x00\r\n\r\n")
        connection = http.client.HTTPConnection("127.0.0.1", port.port, timeout=30)
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 200
        connection.close()


def test_port_that_is_taken_is_one_clear_error() -> None:
    with (
        MetricsPort(Registry(), "127.0.0.1:0") as port,
        socket.socket() as other,
    ):
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(TransportError, match="cannot listen") as raised:
            MetricsPort(Registry(), f"127.0.0.1:{other.getsockname()[1]}")
        assert "metrics.listen" in raised.value.hint
        assert port.port


@pytest.mark.parametrize("text", ["9464", "localhost", "host:", ":9464", "a:70000", "a:x", "a:١"])
def test_listen_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"metrics\.listen"):
        parse_listen(text)


def test_listen_address_of_either_family_is_understood() -> None:
    assert parse_listen("127.0.0.1:9464") == ("127.0.0.1", 9464)
    assert parse_listen("[::1]:0") == ("::1", 0)
