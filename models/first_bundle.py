"""The first bundle of a fleet: a zoo model trained on the operator's own data alone."""

from __future__ import annotations

from pathlib import Path

import torch

from models.build import build_bundle
from models.bundle import Bundle
from models.data.federation import Federation
from models.pretrain import pretrain
from models.zoo import load
from models.zoo_card import card_notes

PRETRAIN_EPOCHS = 20


def make_first_bundle(federation: Federation, model: str, folder: Path, *, seed: int) -> Bundle:
    """Trains the model on the operator's training windows and builds its bundle.

    Raises:
        ConfigurationError: (operator) there is no such model.
        BundleError: the folder is taken.
    """
    entry = load(model)
    # The seed of the weights; torch's own generator is what `make_model` draws from.
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    module = entry.make_model()
    operator = federation.operator
    pretrain(module, entry.task, operator.train_x, operator.train_y, epochs=PRETRAIN_EPOCHS, seed=seed)
    return build_bundle(
        module,
        entry.task,
        entry.input_shape,
        operator.train_x,
        name=model,
        out_dir=folder,
        # A task without classes has no names for them, whatever the data were called.
        labels=federation.labels if entry.task.classes else (),
        evaluation=(operator.val_x, operator.val_y),
        notes=card_notes(model, module),
    )
