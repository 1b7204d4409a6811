"""The service starts whole or not at all, and what cannot be used later does not end it."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cloud_server.deployment import Deployment, initialise
from cloud_server.service import Running, run
from cloud_server.settings import BrokerSettings, CloudSettings, ListenSettings, MetricsSettings, RunSettings
from models.bundle import Bundle
from tests.cloud.small_bundle import write_bundle
from tests.fleet.waiting import wait_for
from wire.errors import BundleError, ConfigurationError, ShoalError
from wire.manifest import TEMPLATE

SETTINGS = CloudSettings(
    listen=ListenSettings(public_port=0, device_port=0),
    broker=BrokerSettings(kind="embedded", port=0),
    metrics=MetricsSettings(listen="127.0.0.1:0"),
)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Deployment]:
    with initialise(tmp_path / "state", SETTINGS) as deployment:
        yield deployment


def take(deployment: Deployment, bundle: Bundle, *, is_damaged: bool = False) -> None:
    """As `shoal-cloud model import` does."""
    kept = deployment.keep_bundle(bundle)
    if is_damaged:
        (kept / TEMPLATE).write_bytes(b"something else")
    deployment.publisher.import_model(bundle)


def refused(deployment: Deployment, **run_settings: str) -> ShoalError:
    deployment.settings = msgspec.structs.replace(deployment.settings, run=RunSettings(**run_settings))
    ready: list[Running] = []
    with pytest.raises(ShoalError) as raised:
        run(deployment, stop=threading.Event(), on_ready=ready.append)
    assert ready == []
    assert list(deployment.folder.broker.iterdir()) == [], "a broker was started"
    return raised.value


def test_model_that_is_damaged_is_one_error_before_anything_starts(
    opened: Deployment, tmp_path: Path
) -> None:
    take(opened, write_bundle(tmp_path / "bundle"), is_damaged=True)
    error = refused(opened)
    assert isinstance(error, BundleError)
    assert error.exit_code == 6
    assert "small" in str(error)
    assert "run.model" in error.hint


def test_model_that_was_never_imported_is_refused_before_anything_starts(opened: Deployment) -> None:
    error = refused(opened, model="nonesuch")
    assert isinstance(error, ConfigurationError)
    assert "nonesuch" in str(error)


@pytest.mark.parametrize(("setting", "value"), [("strategy", "FedAvgg"), ("serverapp", "no_such_module:app")])
def test_strategy_or_app_that_does_not_exist_is_refused_before_anything_starts(
    opened: Deployment, real_bundle: Bundle, setting: str, value: str
) -> None:
    take(opened, real_bundle)
    error = refused(opened, **{setting: value})
    assert isinstance(error, ConfigurationError)
    assert value.partition(":")[0] in str(error)


def test_service_without_a_model_shows_its_metrics_and_outlives_a_damaged_import(
    opened: Deployment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop, running, codes = threading.Event(), list[Running](), list[int]()
    serving = threading.Thread(
        target=lambda: codes.append(run(opened, stop=stop, on_ready=running.append)), daemon=True
    )
    serving.start()
    try:
        wait_for(lambda: bool(running), "the service")
        address = f"http://127.0.0.1:{running[0].metrics_port}/metrics"
        wait_for(lambda: b"\nshoal_broker_connected 1\n" in read(address), "the broker")
        # A command in another process has its own connections.
        with Deployment.open(opened.folder.root) as command:
            take(command, write_bundle(tmp_path / "bundle"), is_damaged=True)
        wait_for(lambda: "run_not_begun" in caplog.text, "the look at the model")
        text = read(address).decode()
        assert "\nshoal_run_paused 1\n" in text
        assert 'shoal_devices{status="approved",presence="online"} 0\n' in text
        assert 'shoal_tuf_expiry_timestamp_seconds{role="timestamp"} 1' in text
        assert 'shoal_certificate_expiry_timestamp_seconds{certificate="ca"} ' in text
        assert "\nprocess_resident_memory_bytes " in text
    finally:
        stop.set()
        serving.join()
    assert codes == [0]


def read(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return bytes(answer.read())
