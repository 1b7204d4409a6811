"""The aggregator's two heavy parts on a GPU: the streamed fold, and refinement in bf16 mixed precision.

Where there is no CUDA device the same code runs small on the CPU and the rows say so: then they show that it works,
and not what a GPU earns. Laws of the file: what is timed is the aggregator's own `Fold` and `Refinery`, from numpy in
to numpy out; the device has finished before a clock is read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from bench.table import Row
from cloud_server.aggregate.fold import Fold, choose_device
from cloud_server.refine.refinement import RefineConfig, Refinery
from models.flat import flatten_buffers, flatten_params
from models.task import Task

CLASSES = 10
REPEATS = 5
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Work:
    """How much is measured.

    Attributes:
        params: length of a folded update.
        updates: folded into one sum.
        width: channels of the refined network's first layer; its last has four times as many.
        image: side of its square input.
        batch_size, samples: of refinement; one epoch is timed.
    """

    params: int
    updates: int
    width: int
    image: int
    batch_size: int
    samples: int


SMALL = Work(params=1_000_000, updates=8, width=16, image=16, batch_size=32, samples=128)
LARGE = Work(params=25_000_000, updates=32, width=128, image=32, batch_size=256, samples=4096)


class Network(nn.Module):
    """Three strided convolutions and one linear layer: images `float32 [N, 3, H, W]` to logits `[N, 10]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.features(x).mean((2, 3))))


def measure(device: torch.device | None = None, work: Work | None = None) -> list[Row]:
    """Rows for the device that configuration would choose (`auto`), against the CPU."""
    device = device or choose_device("auto")
    work = work or (SMALL if device.type == "cpu" else LARGE)
    torch.set_num_threads(1)
    return _fold_rows(device, work) + _refine_rows(device, work)


# ---- the fold --------------------------------------------------------------------------------------------------


def _fold_rows(device: torch.device, work: Work) -> list[Row]:
    rows = []
    for precision in ("float64", "float32"):
        on_cpu = _fold_speed(_CPU, work, precision)
        if device.type == "cpu":
            note = f"{work.updates} x {work.params / 1e6:g}M float32; no CUDA device: small, on the CPU"
            rows.append(Row(f"streamed fold, {precision} sum, CPU", on_cpu, unit="GB/s", note=note))
            continue
        on_device = _fold_speed(device, work, precision)
        note = f"{on_device:.1f} / {on_cpu:.1f} GB/s of float32, {work.updates} x {work.params / 1e6:g}M"
        rows.append(Row(f"streamed fold, {precision} sum: CUDA / CPU", on_device / on_cpu, note=note))
    return rows


def _fold_speed(device: torch.device, work: Work, precision: str) -> float:
    """GB of float32 updates a second that are folded, as they would come from the decoder."""
    rng = np.random.default_rng(0)
    updates = [rng.standard_normal(work.params, dtype=np.float32) for _ in range(4)]

    def run() -> None:
        fold = Fold(work.params, device=device, precision=precision)
        for number in range(work.updates):
            fold.add(updates[number % len(updates)], 1.0 + number)
        _finish(device)

    return 4 * work.params * work.updates / _median_seconds(run) / 1e9


# ---- refinement ------------------------------------------------------------------------------------------------


def _refine_rows(device: torch.device, work: Work) -> list[Row]:
    where = "CUDA" if device.type == "cuda" else "CPU"
    mixed = _refine_speed(device, work, is_mixed=True)
    plain = _refine_speed(device, work, is_mixed=False)
    shape = f"width {work.width}, {work.image} x {work.image}, batch {work.batch_size}"
    alone = "" if where == "CUDA" else "; no CUDA device: small, on the CPU"
    note = f"{mixed:.1f} / {plain:.1f} steps/s, {shape}{alone}"
    rows = [Row(f"refinement on {where}: bf16 / float32", mixed / plain, note=note)]
    if where == "CUDA":
        # The CPU needs minutes for what the GPU does in a second: it gets the small work, the GPU too.
        on_device = _refine_speed(device, SMALL, is_mixed=True)
        on_cpu = _refine_speed(_CPU, SMALL, is_mixed=False)
        note = f"{on_device:.1f} / {on_cpu:.1f} steps/s, width {SMALL.width}, batch {SMALL.batch_size}"
        rows.append(Row("refinement: CUDA in bf16 / CPU in float32", on_device / on_cpu, note=note))
    return rows


def _refine_speed(device: torch.device, work: Work, *, is_mixed: bool) -> float:
    """Optimizer steps a second of one epoch."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((work.samples, 3, work.image, work.image), dtype=np.float32)
    y = rng.integers(0, CLASSES, work.samples)
    config = RefineConfig(epochs=1, batch_size=work.batch_size, learning_rate=0.001, is_mixed=is_mixed)

    def make_module() -> nn.Module:
        return Network(work.width)

    module = make_module()
    params, buffers = flatten_params(module), flatten_buffers(module)
    refinery = Refinery(make_module, Task.classification(CLASSES), x, y, config=config, device=device)

    def run() -> None:
        refinery.refine(params, buffers, seed=1)
        _finish(device)

    return -(-work.samples // work.batch_size) / _median_seconds(run)


def _median_seconds(run: Callable[[], None]) -> float:
    """After one run to warm up."""
    run()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
