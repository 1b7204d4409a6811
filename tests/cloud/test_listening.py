"""Ports that cannot be had are one error that names the option, before anything is started."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_server.deployment import initialise
from cloud_server.listening import check_ports
from cloud_server.run_setup import prepare_run
from cloud_server.service import run
from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    ListenSettings,
    MetricsSettings,
    OperatorSettings,
    RunSettings,
)
from wire.errors import ConfigurationError, TransportError


def settings(port: int, option: str) -> CloudSettings:
    """Free ports everywhere, but for one option."""
    chosen: dict[str, Any] = {
        "listen.public_port": {"listen": ListenSettings(public_port=port, device_port=0)},
        "listen.device_port": {"listen": ListenSettings(public_port=0, device_port=port)},
        "broker.port": {"broker": BrokerSettings(kind="embedded", port=port)},
        "metrics.listen": {"metrics": MetricsSettings(listen=f"127.0.0.1:{port}")},
        "operators.listen": {"operators": OperatorSettings(listen=f"127.0.0.1:{port}")},
    }[option]
    free = CloudSettings(
        listen=ListenSettings(public_port=0, device_port=0),
        broker=BrokerSettings(kind="embedded", port=0),
        operators=OperatorSettings(listen=""),
    )
    return msgspec.structs.replace(free, **chosen)


@pytest.mark.parametrize(
    "option",
    ["listen.public_port", "listen.device_port", "broker.port", "metrics.listen", "operators.listen"],
)
def test_port_that_another_program_has_is_found_before_the_broker_starts(option: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = settings(other.getsockname()[1], option)
        with initialise(tmp_path / "state", taken) as deployment:
            with pytest.raises(TransportError, match=option):
                run(deployment, stop=threading.Event())
            assert list(deployment.folder.broker.iterdir()) == []


def test_port_that_two_options_name_names_both() -> None:
    twice = settings(8500, "listen.public_port")
    twice = msgspec.structs.replace(twice, metrics=MetricsSettings(listen="127.0.0.1:8500"))
    with pytest.raises(ConfigurationError, match=r"metrics\.listen and listen\.public_port"):
        check_ports(twice)


def test_port_of_a_broker_that_runs_elsewhere_is_not_ours_to_have() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        external = settings(0, "broker.port")
        broker = BrokerSettings(kind="external", port=other.getsockname()[1])
        check_ports(msgspec.structs.replace(external, broker=broker))


def test_bulyan_with_too_small_a_quorum_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for quorum in (6, 7):
        chosen = RunSettings(strategy="Bulyan", parameters={"num_malicious_nodes": 1}, quorum=quorum)
        small = msgspec.structs.replace(settings(0, "broker.port"), run=chosen)
        with initialise(tmp_path / f"state-{quorum}", small) as deployment:
            if quorum == 7:
                assert prepare_run(deployment) is None  # there is no model yet
                continue
            with pytest.raises(
                ConfigurationError, match="needs 7 replies, and rounds close with 6"
            ) as caught:
                run(deployment, stop=threading.Event())
            assert caught.value.hint == "set run.quorum to 7 or more"
            assert list(deployment.folder.broker.iterdir()) == []
