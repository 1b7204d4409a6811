"""What a model is trained for: its loss, its metric, and which direction of the metric is better.

A task's torch side is traced into the train step (models/train_step/) and evaluated eagerly by the gate, so
both see the same numbers. Law of the file: losses and metrics are *per sample*, and the caller weights them,
because a short batch is padded with weight 0. `F.cross_entropy` is never used: its exported gradient is the
batch size times too large, without an error; one-hot times log-softmax is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from wire.errors import ModelError
from wire.manifest import TaskSpec

TaskKind = Literal["classification", "anomaly"]


@dataclass(frozen=True, slots=True)
class Task:
    """A training task.

    Attributes:
        kind: "classification" (labels decide) or "anomaly" (an autoencoder, labels are ignored).
        loss: name of the per-sample loss: "cross_entropy" or "mse".
        metric: name of the per-sample metric: "accuracy" or "mse".
        higher_is_better: direction of the metric.
        classes: number of classes; 0 for a task without labels.
    """

    kind: TaskKind
    loss: str
    metric: str
    higher_is_better: bool
    classes: int

    @classmethod
    def classification(cls, classes: int) -> Self:
        """Softmax classification over `classes` labels, measured by accuracy.

        Raises:
            ModelError: fewer than two classes.
        """
        if classes < 2:
            raise ModelError(f"a classification needs at least 2 classes, not {classes}", classes=classes)
        return cls("classification", "cross_entropy", "accuracy", True, classes)

    @classmethod
    def anomaly(cls) -> Self:
        """Reconstruction by an autoencoder; loss, metric and anomaly score are the mean squared error."""
        return cls("anomaly", "mse", "mse", False, 0)

    def spec(self, labels: tuple[str, ...] = ()) -> TaskSpec:
        """The task as a manifest states it; `labels` names the classes, in order, or is empty."""
        return TaskSpec(
            kind=self.kind,
            loss=self.loss,
            metric=self.metric,
            higher_is_better=self.higher_is_better,
            classes=self.classes,
            labels=labels,
        )

    def sample_losses(self, outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each sample.

        Args:
            outputs: what the model answered: logits `float32 [B, classes]`, or a reconstruction shaped like
                `x`.
            x: the model's input, `float32 [B, …]`.
            y: labels, `int64 [B]`; ignored by a task without labels.

        Returns:
            `float32 [B]`.
        """
        if self.kind == "anomaly":
            return _squared_error(outputs, x)
        one_hot = (y.unsqueeze(1) == torch.arange(self.classes, device=y.device)).to(outputs.dtype)
        return -(functional.log_softmax(outputs, -1) * one_hot).sum(1)

    def sample_metrics(self, outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Metric of each sample, shapes as in `sample_losses`."""
        if self.kind == "anomaly":
            return _squared_error(outputs, x)
        return (outputs.argmax(1) == y).to(outputs.dtype)

    def check_outputs(self, outputs: Tensor, x: Tensor) -> None:
        """Check that a model's answer has the shape that the task needs.

        Raises:
            ModelError: it has not; the message names both shapes.
        """
        wanted = tuple(x.shape) if self.kind == "anomaly" else (x.shape[0], self.classes)
        if tuple(outputs.shape) != wanted:
            raise ModelError(
                f"the model answers {tuple(outputs.shape)} where the task needs {wanted}",
                hint="give one logit per class, or the input's own shape for an autoencoder",
                shape=tuple(outputs.shape),
                wanted=wanted,
            )


def _squared_error(outputs: Tensor, x: Tensor) -> Tensor:
    difference = (outputs - x).flatten(1)
    return (difference * difference).mean(1)
