"""Loss and metric of an inference file on held-out data: what a gate compares.

Law of the file: the numbers are those of `models/task.py`, computed in float64 from the file's own answers,
so an int8 file is judged as it will be served.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models import ort
from wire.errors import DataError, ModelError
from wire.manifest import TaskSpec

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_BATCH = 256


@dataclass(frozen=True)
class Score:
    """Means over the samples; `metric` is the one that the task names."""

    loss: float
    metric: float
    samples: int


def evaluate(model: bytes, task: TaskSpec, x: Floats, y: Labels) -> Score:
    """Runs a model file over labelled data.

    Args:
        model: ONNX with the input `x` and one output.
        task: decides loss and metric.
        x: float32 [N, …].
        y: int64 [N]; ignored by a task without labels.

    Raises:
        DataError: (operator) no data, as many labels as samples are missing, or an unknown label.
        ModelError: the file does not run, or an answer is not finite.
    """
    if not len(x) or len(x) != len(y):
        raise DataError(f"{len(x)} samples and {len(y)} labels cannot be evaluated")
    if task.kind == "classification" and not (y.min() >= 0 and y.max() < task.classes):
        raise DataError(f"a label is not between 0 and {task.classes - 1}")
    answers = answers_of(model, x)
    losses, metrics = _scores(task, answers, x, y)
    return Score(float(losses.mean()), float(metrics.mean()), len(x))


def answers_of(model: bytes, x: Floats) -> Floats:
    """The model file's answers, float32 [N, …].

    Raises:
        ModelError: it does not run, or an answer is not finite.
    """
    session = ort.make_session(model)
    parts = [
        next(iter(ort.run(session, {"x": x[at : at + _BATCH]}).values())) for at in range(0, len(x), _BATCH)
    ]
    answers: Floats = np.concatenate(parts)
    if not np.isfinite(answers).all():
        raise ModelError("the model gives an answer that is not finite")
    return answers


def anomaly_scores(model: bytes, x: Floats) -> npt.NDArray[np.float64]:
    """The score of each sample by an autoencoder's file: its reconstruction's mean squared error, float64 [N].

    Raises:
        ModelError: the file does not run, or an answer is not finite.
    """
    return _squared_errors(answers_of(model, x), x)


def area_under_curve(usual: npt.NDArray[np.float64], unusual: npt.NDArray[np.float64]) -> float:
    """How well a score tells two kinds of samples apart: the chance that an unusual one has the higher score.

    The area under the receiver operating characteristic, as Mann and Whitney's statistic; ties count half.

    Args:
        usual: scores float64 [N].
        unusual: scores float64 [M].

    Returns:
        0 to 1; 0.5 for a score that says nothing.

    Raises:
        DataError: no scores of one kind.
    """
    if not len(usual) or not len(unusual):
        raise DataError("there are no samples to tell apart", usual=len(usual), unusual=len(unusual))
    ordered = np.sort(usual)
    below = np.searchsorted(ordered, unusual, "left") + np.searchsorted(ordered, unusual, "right")
    return float(below.mean() / 2 / len(usual))


def _squared_errors(answers: Floats, x: Floats) -> npt.NDArray[np.float64]:
    errors: npt.NDArray[np.float64] = ((answers.astype(np.float64) - x) ** 2).reshape(len(x), -1).mean(axis=1)
    return errors


def _scores(
    task: TaskSpec, answers: Floats, x: Floats, y: Labels
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if task.kind == "anomaly":
        errors = _squared_errors(answers, x)
        return errors, errors
    logits = answers.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]
    return losses, (logits.argmax(axis=1) == y).astype(np.float64)
