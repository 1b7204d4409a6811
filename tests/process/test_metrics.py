"""Metrics: the text that Prometheus reads, bounds, threads."""

from __future__ import annotations

import threading

import pytest

from process.metrics import Registry
from wire.errors import ConfigurationError


def test_exposition_is_what_prometheus_reads() -> None:
    registry = Registry()
    rounds = registry.counter("shoal_rounds_total", "Rounds by outcome.\nTwo lines.", ["outcome"])
    rounds.add(outcome="done")
    rounds.add(2, outcome='odd "name"\\\n')
    registry.gauge("shoal_devices", "Present.").set(16)
    seconds = registry.histogram("shoal_round_seconds", "Duration.", buckets=[0.1, 1, 10])
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


def test_empty_registry_renders_nothing_and_a_plain_counter_starts_at_zero() -> None:
    registry = Registry()
    assert registry.render() == ""
    registry.counter("x_total", "X.")
    assert registry.render().endswith("x_total 0\n")


def test_label_sets_are_bounded_and_the_rest_is_counted_together() -> None:
    counter = Registry(max_label_sets=3).counter("x_total", "X.", ["peer"])
    for number in range(100):
        counter.add(peer=f"p{number}")
    assert [counter.value(peer=name) for name in ("p0", "p2", "p3", "_other")] == [1, 1, 0, 97]
    assert len(counter.samples()) == 4


def test_gauge_moves_both_ways_and_can_be_read_from_a_function() -> None:
    registry = Registry()
    gauge = registry.gauge("queue_bytes", "Q.", ["name"])
    gauge.set(5, name="a")
    gauge.add(-7, name="a")
    assert gauge.value(name="a") == -2
    assert gauge.value(name="b") is None
    live = registry.gauge("live_bytes", "L.")
    live.set_function(lambda: 1.5)
    assert "live_bytes 1.5\n" in registry.render()
    with pytest.raises(ConfigurationError):
        gauge.set_function(lambda: 1.0)


def test_additions_from_many_threads_are_all_counted() -> None:
    counter = Registry().counter("x_total", "X.", ["worker"])

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
    counter = registry.counter("x_total", "X.", ["a"])
    for call in (
        lambda: registry.counter("x_total", "again"),
        lambda: registry.counter("x", "does not end in _total"),
        lambda: registry.gauge("Bad-Name", "X."),
        lambda: registry.histogram("h_seconds", "X.", buckets=[2, 1]),
        lambda: counter.add(-1, a="b"),
        lambda: counter.add(b="c"),
        lambda: counter.add(),
    ):
        with pytest.raises(ConfigurationError):
            call()
