"""What each model of the zoo reached once, trained by federation and served as its int8 file:
`zoo/federated.json`.

Laws of the file: every figure was written by `python -m bench cards`, none by hand; a figure belongs to one
architecture, which is named by what it answers, and is not shown for another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from wire.errors import DataError, ModelError

FILE = Path(__file__).with_name("zoo") / "federated.json"
_PROBES = 4
# Other versions of torch add in another order; another architecture answers something else.
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class FederatedResult:
    """One run of one model.

    Attributes:
        command: plays the run again.
        data: the data set, and how it was divided.
        split_hash: SHA-256 over every sample of every part.
        samples: later samples behind the scores, which nothing was trained or chosen on.
        metric: the task's; a score is its mean over the samples.
        int8_first, float32_first: scores of the first bundle, trained on the operator's data alone.
        int8_last, float32_last: scores of the last release.
        update_bytes_ratio: sealed updates over the same as float32.
        separation_first, separation_last: for an anomaly score: AUC by what it was told apart from.
        answers: what the architecture answers, see `answers_of`.
    """

    command: str
    data: str
    split_hash: str
    seed: int
    devices: int
    rounds: int
    releases: int
    hold_backs: int
    strategy: str
    codec: str
    samples: int
    metric: str
    int8_first: float
    int8_last: float
    float32_first: float
    float32_last: float
    update_bytes_ratio: float
    separation_first: Mapping[str, float] = field(default_factory=dict)
    separation_last: Mapping[str, float] = field(default_factory=dict)
    answers: tuple[float, ...] = ()

    def fits(self, module: nn.Module, input_shape: tuple[int, ...]) -> bool:
        """Whether the module is of the architecture that was measured, whatever its parameters are."""
        try:
            found = answers_of(module, input_shape)
        except ModelError:
            return False
        return len(found) == len(self.answers) and np.allclose(found, self.answers, _TOLERANCE, _TOLERANCE)

    def text(self) -> str:
        """The result as a paragraph and a table, in Markdown."""
        share = self.metric == "accuracy"

        def shown(score: float) -> str:
            return f"{score:.1%}" if share else f"{score:.4f}"

        rows = [
            ("int8, as devices serve it", shown(self.int8_first), shown(self.int8_last)),
            ("float32, for comparison", shown(self.float32_first), shown(self.float32_last)),
            *(
                (f"AUC against {kind}", f"{self.separation_first[kind]:.3f}", f"{auc:.3f}")
                for kind, auc in self.separation_last.items()
            ),
        ]
        head = f"| {self.metric} on {self.samples:,} later samples | first bundle | last release |"
        table = [head, "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
        return (
            f"{self.devices} devices, {self.rounds} rounds of {self.strategy}, {self.releases} releases, "
            f"{self.hold_backs} candidates held back by the gate; sealed updates ({self.codec}) are "
            f"{self.update_bytes_ratio:.1%} of float32. Data: {self.data}; no part of them that was trained or chosen "
            "on is in the scores. The first bundle was trained on the operator's own data alone.\n\n"
            + "\n".join(table)
            + f"\n\nAgain: `{self.command}` (split `{self.split_hash[:16]}`)."
        )


def answers_of(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[float, ...]:
    """A few answers of the module with every parameter and the input set by a fixed rule: the architecture's name.

    It changes with every layer, size, stride and activation, and neither with the parameters nor with the exporter.
    The module keeps its own parameters.

    Raises:
        ModelError: the module does not take such an input.
    """
    state = module.state_dict()
    fixed: dict[str, torch.Tensor] = {}
    for number, (name, value) in enumerate(state.items()):
        waves = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.7 + number)
        scale = (value.numel() / max(1, value.shape[0] if value.dim() else 1)) ** -0.5
        fixed[name] = (waves * scale).to(value.dtype).reshape(value.shape)
    x = torch.sin(torch.arange(int(np.prod(input_shape)), dtype=torch.float64) * 0.3)
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()
            outputs = torch.func.functional_call(module, fixed, (x.float().reshape(1, *input_shape),))
    except RuntimeError as error:
        raise ModelError(f"the module does not take a sample {input_shape}") from error
    finally:
        module.train(was_training)
    answers = outputs.double().flatten()
    places = torch.linspace(0, len(answers) - 1, _PROBES).long()
    return tuple(round(float(answer), 6) for answer in answers[places])


@lru_cache(maxsize=1)
def results() -> Mapping[str, FederatedResult]:
    """Every model's result, by the model's name.

    Raises:
        DataError: (us) the file is not what `python -m bench cards` writes.
    """
    try:
        rows: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
        return {
            model: FederatedResult(**{**row, "answers": tuple(row["answers"])}) for model, row in rows.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{FILE} holds no results: {error}", hint="run `python -m bench cards`") from error


def keep(new: Mapping[str, FederatedResult]) -> None:
    """Writes results into the file, beside those of the other models."""
    known = dict(results()) if FILE.exists() else {}
    rows = {model: asdict(result) for model, result in sorted({**known, **new}.items())}
    FILE.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    results.cache_clear()
