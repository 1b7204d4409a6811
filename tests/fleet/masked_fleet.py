"""The aggregator of tests that kill real processes in the middle of a round whose updates are masked."""

from __future__ import annotations

from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    GateSettings,
    ListenSettings,
    RunSettings,
    SecureSettings,
    TrainSettings,
)
from fleet.local_cloud import free_port

DEVICES = ("person-05-left", "person-05-right", "person-06-left", "person-06-right")


def settings(name: str, secure: SecureSettings, *, quorum: int) -> CloudSettings:
    """One round of `DEVICES`, of a fleet and a run of this name, that waits for `set_paused(False)`."""
    return CloudSettings(
        fleet=name,
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="embedded", port=free_port()),
        run=RunSettings(
            name=name,
            strategy="FedAvg",
            seed=11,
            rounds=1,
            quorum=quorum,
            evaluate_every=0,
            paused=True,
            deadline_seconds=90.0,
            max_holdout_drop=1.0,
        ),
        secure=secure,
        train=TrainSettings(epochs=1, batch_size=16, learning_rate=0.02),
        gate=GateSettings(max_operator_drop=1.0),
    )
