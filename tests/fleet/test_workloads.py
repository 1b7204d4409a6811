"""The data of every model's fleet: each of the zoo has some, an anomaly model never meets what it is measured on."""

from __future__ import annotations

import numpy as np
import pytest

from fleet.anomalies import without_class
from fleet.scenario import DataScenario
from fleet.virtual_people import people_federation
from fleet.workloads import UNSEEN_LABEL, WORKLOADS, workload
from models.data import smartwatch
from models.data.federation import Federation, Split
from models.zoo import ZOO, load
from wire.errors import ConfigurationError


def later(federation: Federation) -> Split:
    """All devices' reported samples, as one split that has no others."""
    splits = federation.devices.values()
    x, y = (np.concatenate([getattr(split, name) for split in splits]) for name in ("test_x", "test_y"))
    return Split(x[:0], y[:0], x[:0], y[:0], x, y)


def test_every_model_of_the_zoo_has_a_workload() -> None:
    assert set(WORKLOADS) == set(ZOO)
    with pytest.raises(ConfigurationError, match="no model 'watch'"):
        workload("watch")


@pytest.mark.parametrize("model", ["watch_cnn1d", "tiny_transformer", "watch_autoencoder", "digits_mlp"])
def test_workload_gives_what_its_model_takes(model: str) -> None:
    made = load(model)
    federation = workload(model).federation(4, DataScenario(crop=0.8), 1)
    assert len(federation.devices) == 4
    assert federation.input_shape == made.input_shape
    for split in federation.devices.values():
        assert split.train_x.shape[1:] == made.input_shape
        assert min(len(split.train_x), len(split.val_x), len(split.test_x)) > 0
        assert made.task.classes in (0, len(federation.labels))


def test_real_people_are_the_recordings_themselves() -> None:
    real = people_federation(16, DataScenario(people="real"), seed=1)
    assert real.split_hash() == smartwatch.federation().split_hash()


def test_hidden_class_is_in_no_part() -> None:
    whole = people_federation(4, DataScenario(crop=0.8), seed=1)
    federation = without_class(whole, UNSEEN_LABEL, seed=1)
    for split in (federation.operator, *federation.devices.values()):
        for labels in (split.train_y, split.val_y, split.test_y):
            assert len(labels)
            assert UNSEEN_LABEL not in labels
    hidden = federation.unseen["class ROW"]
    assert len(hidden) == int((later(whole).test_y == UNSEEN_LABEL).sum()) > 0
    assert len(hidden) + len(later(federation).test_x) == len(later(whole).test_x)


def test_faults_are_made_of_later_windows_by_the_seed() -> None:
    whole = people_federation(2, DataScenario(), seed=1)
    federation = without_class(whole, UNSEEN_LABEL, seed=1)
    usual = later(federation).test_x
    noisy, stuck = federation.unseen["noise on every channel"], federation.unseen["one channel stuck"]
    assert 0.45 < float((noisy - usual).std()) < 0.55
    # One channel of each window keeps its first value, all others are as they were.
    changed = (stuck != usual).any(axis=2)
    assert (changed.sum(axis=1) <= 1).all()
    assert changed.any()
    assert np.ptp(stuck, axis=2).min(axis=1).max() == 0.0
    again = without_class(whole, UNSEEN_LABEL, seed=1)
    assert again.split_hash() == federation.split_hash()
    assert without_class(whole, UNSEEN_LABEL, seed=2).split_hash() != federation.split_hash()
