"""What each model of the zoo learns in a local fleet: from which data, divided how, and trained with what.

Laws of the file: a fleet's data depend on the scenario, the number of devices and the seed alone; the settings of
training were chosen on validation samples, never on those that a report is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from cloud_server.settings import TrainSettings
from fleet.anomalies import without_class
from fleet.scenario import DataScenario
from fleet.virtual_people import people_federation
from models.data import digits, fashion_mnist, smartwatch
from models.data.federation import Federation
from models.zoo import ZOO, load

MakeFederation = Callable[[int, DataScenario, int], Federation]

UNSEEN_LABEL = len(smartwatch.LABELS) - 1
"""The exercise that an anomaly model's fleet never does. The last of the list: not chosen by any result."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One model's part in a fleet.

    Attributes:
        federation: makes the data of so many devices.
        train: what devices are asked to do.
    """

    federation: MakeFederation
    train: TrainSettings


def _watch(devices: int, data: DataScenario, seed: int) -> Federation:
    return people_federation(devices, data, seed=seed)


def _watch_without_labels(devices: int, data: DataScenario, seed: int) -> Federation:
    return without_class(_watch(devices, data, seed), UNSEEN_LABEL, seed=seed)


def _fashion(devices: int, data: DataScenario, seed: int) -> Federation:
    federation = fashion_mnist.federation(devices, data.alpha, seed, samples=data.samples)
    name = f"{federation.name}, {data.samples:,} images divided by Dirichlet {data.alpha:g}"
    return replace(federation, name=name)


def _digits(devices: int, data: DataScenario, seed: int) -> Federation:
    federation = digits.federation(devices, data.alpha, seed)
    return replace(federation, name=f"{federation.name}, divided by Dirichlet {data.alpha:g}")


def _sgd(epochs: int, batch_size: int, learning_rate: float) -> TrainSettings:
    return TrainSettings(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, momentum=0.9, clipping_norm=2.0
    )


def _adam(epochs: int, batch_size: int, learning_rate: float) -> TrainSettings:
    return TrainSettings(
        optimizer="adam", epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, clipping_norm=2.0
    )


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "watch_cnn1d": Workload(_watch, _sgd(2, 16, 0.02)),
        "tiny_transformer": Workload(_watch, _adam(2, 16, 0.001)),
        "watch_autoencoder": Workload(_watch_without_labels, _adam(2, 16, 0.001)),
        "fashion_cnn": Workload(_fashion, _sgd(1, 32, 0.02)),
        "fashion_mobile": Workload(_fashion, _adam(1, 32, 0.001)),
        "digits_mlp": Workload(_digits, _sgd(5, 16, 0.05)),
    }
)


def workload(model: str) -> Workload:
    """A model's part by its name.

    Raises:
        ConfigurationError: (operator) the zoo has no such model; the hint names the nearest.
    """
    if model not in ZOO:
        load(model)
    return WORKLOADS[model]
