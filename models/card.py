"""The card of a model: what a person should know before it runs on a device. Source: arXiv:1810.03993."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wire.manifest import Manifest


@dataclass(frozen=True)
class CardNotes:
    """What only the author knows; each is a sentence or more, or empty.

    Attributes:
        summary: what the model does and for whom.
        data: what it was trained on, and under which licence.
        federated: what it reached when it was trained by federation and served as the int8 file.
        limits: where it must not be used.
    """

    summary: str = ""
    data: str = ""
    federated: str = ""
    limits: str = ""


def write_card(
    manifest: Manifest, notes: CardNotes, sizes: Mapping[str, int], metrics: Mapping[str, float], samples: int
) -> str:
    """Markdown of `CARD.md`.

    Args:
        sizes: bytes of each file.
        metrics: measured at the build, on `samples` held-out samples (none are listed where there are 0).
    """
    task = manifest.task
    input_shape = " × ".join(map(str, manifest.input_shape))
    facts = [
        (
            "Task",
            f"{task.kind}, loss {task.loss}, metric {task.metric} ({_direction(task.higher_is_better)})",
        ),
        ("Input", f"`x` float32, batch × {input_shape}"),
        ("Output", f"`{manifest.output_name}` float32, batch × {' × '.join(map(str, _output(manifest)))}"),
        ("Classes", ", ".join(task.labels) or str(task.classes or "none")),
        ("Parameters", f"{manifest.params_size:,} trainable, {manifest.buffers_size:,} in buffers"),
        ("Quantized", f"{len(manifest.int8.layers)} layers, {manifest.ranges_count} activation ranges"),
        ("Graphs", f"`{manifest.graphs_sha256}`"),
    ]
    parts = [f"# {manifest.model}", notes.summary, "## Facts", _table(("", ""), facts)]
    if notes.data:
        parts += ["## Data", notes.data]
    parts += ["## Files", _table(("file", "bytes"), [(f"`{n}`", f"{s:,}") for n, s in sorted(sizes.items())])]
    if samples:
        rows = [(name.replace("_", " "), f"{value:.4f}") for name, value in sorted(metrics.items())]
        parts += [f"## At the build, on {samples:,} held-out samples", _table(("measure", "value"), rows)]
    if notes.federated:
        parts += ["## Trained by federation, served as int8", notes.federated]
    if notes.limits:
        parts += ["## Limits", notes.limits]
    return "\n\n".join(part for part in parts if part) + "\n"


def _output(manifest: Manifest) -> tuple[int, ...]:
    return manifest.golden_outputs_shape[2:]


def _direction(higher_is_better: bool) -> str:
    return "higher is better" if higher_is_better else "lower is better"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join(lines)
