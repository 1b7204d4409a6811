"""One device and a model that has learnt nothing: for figures that do not depend on what is learnt."""

from __future__ import annotations

from pathlib import Path

import torch

from models.build import build_bundle
from models.bundle import Bundle
from models.data.federation import Federation
from models.zoo import load


def one_device(federation: Federation) -> Federation:
    """The first device of a federation, alone."""
    device, split = next(iter(federation.devices.items()))
    return Federation(
        federation.name, federation.labels, federation.input_shape, federation.operator, {device: split}
    )


def initial_bundle(federation: Federation, model: str, folder: Path) -> Bundle:
    """The zoo's model as it is initialised, the same each time."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    entry = load(model)
    return build_bundle(
        entry.make_model(),
        entry.task,
        entry.input_shape,
        federation.operator.train_x,
        name=model,
        out_dir=folder,
        labels=federation.labels,
    )
