"""From a user's own torch module and samples to a bundle: `shoal-cloud model build mypackage:make_model
--data …`.

Laws of the file: the user's folder is appended to `sys.path`, never put in front, so that nothing of theirs
can stand in for a part of ours; the same seed and samples give the same bundle on one machine.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.build import build_bundle
from models.bundle import Bundle
from models.card import CardNotes
from models.pretrain import pretrain
from models.samples import Samples
from models.task import Task, TaskKind
from models.train_step import SamplePrivacy
from models.train_step.support import check_supported
from models.zoo import ZOO, load
from models.zoo_card import card_notes
from wire.errors import BundleError, ConfigurationError, DataError, ModelError

Floats = npt.NDArray[np.float32]

HELD_OUT_SHARE = 0.2
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def load_maker(source: str, folder: Path) -> Callable[[], nn.Module]:
    """The function that makes the module.

    Args:
        source: `package.module:function`, or the name of a zoo model.
        folder: where the user's package lies; its end of `sys.path` is the last.

    Raises:
        ConfigurationError: (operator) no such module or function.
    """
    if ":" not in source:
        return load(source).make_model
    module_name, _, function = source.partition(":")
    place = str(folder.absolute())
    if place not in sys.path:
        sys.path.append(place)
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything when it is run
        raise ConfigurationError(
            f"{module_name!r} cannot be imported: {_said(error)}",
            hint=f"it is looked for last in {place}; a package named like one of Shoal's is never found",
        ) from error
    maker = getattr(module, function, None)
    if not callable(maker):
        raise ConfigurationError(
            f"{module_name} ({module.__file__}) has no function {function!r}",
            hint="a package of yours that is named like one of Shoal's is never found",
        )
    return _checked_maker(source, maker)


def _checked_maker(source: str, maker: Callable[[], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        try:
            made = maker()
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            raise ConfigurationError(
                f"{source} failed: {_said(error)}", hint="it is called without arguments"
            ) from error
        if not isinstance(made, nn.Module):
            raise ConfigurationError(f"{source} gave a {type(made).__name__}, not a torch.nn.Module")
        return made

    return make


def check_answers(module: nn.Module, task: Task, x: Floats) -> None:
    """Runs the module once, before anybody waits for its training.

    Args:
        x: float32 [N, …], one or more samples.

    Raises:
        UnsupportedLayerError: a layer cannot be trained on a device; names it and the substitute.
        ModelError: the module does not take such samples, or does not answer what the task needs.
    """
    check_supported(module)
    samples = torch.from_numpy(x)
    try:
        with torch.no_grad():
            outputs = module(samples)
    except Exception as error:  # a user's forward may raise anything
        raise ModelError(
            f"the module does not take samples {tuple(x.shape[1:])}: {_said(error)}",
            hint="x of --data is float32 [N, …], N samples in the shape that the module takes",
        ) from error
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the module answers a {type(outputs).__name__}, not one tensor", hint="return the logits alone"
        )
    task.check_outputs(outputs, samples)


def check_name(name: str) -> None:
    """Looks at a model's name before anything is built under it.

    Raises:
        ConfigurationError: (operator) it cannot be a model's name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot be a model's name", hint="use A-Z a-z 0-9 _ - (1 to 64), with --name"
        )


def _said(error: BaseException) -> str:
    """What another's code raised, and where, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError | ImportError):
        where = ""  # the message has it, or the line is importlib's
    return f"{type(error).__name__}: {error}{where}"


def _task(kind: TaskKind, labels: tuple[str, ...], samples: Samples) -> Task:
    if kind == "anomaly":
        if labels:
            raise ConfigurationError("an anomaly model has no labels", hint="leave --labels away")
        return Task.anomaly()
    largest = int(samples.y.max())
    if labels and largest >= len(labels):
        raise DataError(f"label {largest} is beyond the {len(labels)} labels", hint="name all labels")
    if len(set(labels)) != len(labels):
        raise DataError("two classes have the same label", hint="name each class once")
    return Task.classification(len(labels) or largest + 1)


def build_own_model(
    make_model: Callable[[], nn.Module],
    samples: Samples,
    *,
    name: str,
    out_dir: Path,
    kind: TaskKind = "classification",
    labels: tuple[str, ...] = (),
    epochs: int = 20,
    seed: int = 0,
    summary: str = "",
    privacy: SamplePrivacy | None = None,
) -> Bundle:
    """Trains the module on four fifths of the samples, measures it on the rest, and builds its bundle.

    Args:
        labels: name of each class; without them, classes are counted up to the largest label.
        epochs: passes of the first training; 0 for a module that comes trained.
        privacy: devices train by DP-SGD; None for the usual step.

    Raises:
        DataError: (operator) a label beyond the classes.
        ModelError: (operator) the module cannot be trained on a device; names the layer and the substitute.
        BundleError: (operator) the folder is taken.
    """
    task = _task(kind, labels, samples)
    check_name(name)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise BundleError(f"{out_dir} is taken", hint="name a folder that does not exist")
    order = np.random.default_rng(seed).permutation(len(samples.x))
    held_out = max(1, int(len(order) * HELD_OUT_SHARE))
    test, train = order[:held_out], order[held_out:]
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    module = make_model()
    check_answers(module, task, samples.x[train[:2]])
    if epochs:
        pretrain(module, task, samples.x[train], samples.y[train], epochs=epochs, seed=seed)
    return build_bundle(
        module,
        task,
        samples.x.shape[1:],
        samples.x[train],
        name=name,
        out_dir=out_dir,
        labels=labels,
        evaluation=(samples.x[test], samples.y[test]),
        notes=_notes(make_model, module, _with_privacy(summary, privacy)),
        privacy=privacy,
    )


def _with_privacy(summary: str, privacy: SamplePrivacy | None) -> str:
    if privacy is None:
        return summary
    said = (
        "Devices train it by DP-SGD: the gradient of each sample is clipped to"
        f" {privacy.clipping_norm:g}, with noise of {privacy.noise_multiplier:g} times that on their sum."
    )
    return f"{summary} {said}" if summary else said


def _notes(make_model: Callable[[], nn.Module], module: nn.Module, summary: str) -> CardNotes:
    """What the author says; a model of the zoo, known by where its function stands, brings what is known of it."""
    name = make_model.__module__.removeprefix("models.zoo.")
    if name not in ZOO:
        return CardNotes(summary=summary)
    known = card_notes(name, module, is_own_data=False)
    return replace(known, summary=summary) if summary else known
