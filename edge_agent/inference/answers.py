"""Answers, samples and labels: what a program on the device says to its agent, from any thread.

Law of the file: nothing here waits for the agent's loop or the network; what is kept to learn from goes to the sample
store and nowhere else. Source: docs/architecture.md, laws 2 and 7.
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np

from edge_agent.inference.feedback import Answered, RecentWindows, belongs_to_validation
from edge_agent.inference.serving import Answer
from edge_agent.parts import Parts
from edge_agent.ports import Floats
from wire.errors import DataError

Split = Literal["train", "val"]


class Answers:
    """The side of an agent that its users see; `Agent` documents the methods."""

    def __init__(self, parts: Parts) -> None:
        inference = parts.settings.inference
        self._parts = parts
        self._recent = RecentWindows(max_windows=inference.recent_windows, max_bytes=inference.recent_bytes)
        self._numbers = itertools.count(1)

    def infer(self, x: Floats, sample_id: str) -> Answer:
        parts = self._parts
        if not sample_id:
            sample_id = f"{parts.boot_id[:4].hex()}-{next(self._numbers)}"
        started = parts.clock.monotonic()
        answer = parts.serving.infer(x, sample_id)
        parts.tally.answered(parts.clock.monotonic() - started)
        self._recent.keep(sample_id, Answered(np.asarray(x, np.float32), answer.label))
        return answer

    def observe(self, x: Floats, label: int | None, split: Split | None) -> int:
        self._check_label(label)
        now = self._parts.clock.now()
        window = np.asarray(x, np.float32)
        if split is None:
            split = self._split_of(f"{now}-{window.ravel()[:8].tobytes().hex()}")
        return self._parts.samples.add(window, label, now, split)

    def feedback(self, sample_id: str, label: int) -> bool:
        self._check_label(label)
        answered = self._recent.take(sample_id)
        if answered is None:
            return False
        parts = self._parts
        parts.samples.add(answered.window, label, parts.clock.now(), self._split_of(sample_id))
        parts.feedback_total += 1
        parts.feedback_correct += int(answered.label == label)
        return True

    def _split_of(self, name: str) -> Split:
        share = self._parts.settings.training.validation_share
        return "val" if belongs_to_validation(name, share) else "train"

    def _check_label(self, label: int | None) -> None:
        """Before there is a model, nobody knows its classes: then training leaves out what does not fit."""
        model = self._parts.serving.current
        if label is None or model is None or model.task.kind != "classification":
            return
        if not 0 <= label < model.task.classes:
            raise DataError(
                f"label {label} is not one of the model's {model.task.classes} classes",
                hint=f"labels are class numbers, 0 to {model.task.classes - 1}",
            )
