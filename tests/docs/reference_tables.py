"""The parts of the documents that follow from the code. `python -m tests.docs.reference_tables` writes them anew.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

import cloud_server.cli
import cloud_server.settings
import edge_agent.cli
import edge_agent.settings
import fleet.cli
from cloud_server.helper.folder import HelperSettings
from cloud_server.metrics import CloudMetrics
from cloud_server.settings import CloudSettings
from edge_agent.settings import EdgeSettings
from edge_agent.vitals.metrics import EdgeMetrics
from fleet.scenario import Scenario
from process.exits import EXIT_CODES
from process.metrics import Metric, Registry
from process.options import Option, options
from process.vitals import register_vitals
from wire import errors

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
REFERENCE = DOCS / "reference.md"
OWN_MODEL = DOCS / "how-to" / "your-own-model.md"
_PART = re.compile(r"(<!-- generated: (?P<name>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(text: str) -> str:
    """The document with every generated part as it should be."""
    return _PART.sub(lambda part: f"{part[1]}{PARTS[part['name']]()}\n{part[3]}", text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def settings_table(cls: type[msgspec.Struct], prefix: str = "") -> str:
    def row(option: Option) -> list[str]:
        cells = [f"`{option.key}`", option.type_name, f"`{option.default}`", option.description]
        return [*cells, f"`{option.variable}`"] if prefix else cells

    head = ["key", "type", "default", "meaning", *(["variable"] if prefix else [])]
    return table(head, map(row, options(cls, prefix)))


def metrics_table(registry: Registry) -> str:
    """Every metric of a process, with its labels' values."""

    def row(metric: Metric) -> list[str]:
        labels = "; ".join(f"`{label}`: {', '.join(values)}" for label, values in metric.labels.items())
        return [f"`{metric.name}`", metric.kind, labels, metric.meaning, metric.use]

    head = ("name", "kind", "labels", "what it is", "what to do with it")
    return table(head, map(row, registry.metrics()))


def aggregator_metrics() -> str:
    metrics = CloudMetrics()
    register_vitals(metrics.registry, 0.0)
    return metrics_table(metrics.registry)


def device_metrics() -> str:
    metrics = EdgeMetrics()
    register_vitals(metrics.registry, 0.0)
    return metrics_table(metrics.registry)


def exit_codes() -> str:
    return table(("code", "meaning"), ([str(code), meaning] for code, meaning in EXIT_CODES.items()))


def error_tree() -> str:
    """The tree as the module's docstring draws it."""
    drawn = (errors.__doc__ or "").split("\n\n")[1]
    return f"```text\n{drawn}\n```"


def shown_help(main: Callable[[list[str]], int], path: list[str]) -> str:
    out = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "110"
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*path, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return out.getvalue().rstrip()


def subcommands(text: str) -> list[str]:
    """The commands that a help text lists."""
    _, _, listed = text.partition("positional arguments:")
    if not re.match(r"\s+(COMMAND|ACTION)\n", listed):
        return []
    return re.findall(r"^ {4}([a-z]+)\b", listed.partition("\n\n")[0], re.MULTILINE)


def helps(command: str, main: Callable[[list[str]], int]) -> str:
    """The help of a command and of all below it, the deepest only."""
    texts = []

    def visit(path: list[str]) -> None:
        text = shown_help(main, path)
        below = subcommands(text)
        if not below:
            texts.append(f"### `{' '.join([command, *path])}`\n\n```text\n{text}\n```")
        for name in below:
            visit([*path, name])

    visit([])
    return "\n\n".join(texts)


def layer_name(layer: type) -> str:
    return f"`nn.{layer.__name__}`"


def supported_layers() -> str:
    from models.train_step.support import SUPPORTED_LAYERS

    return ", ".join(
        sorted(layer_name(layer) for layer in SUPPORTED_LAYERS if not layer.__name__.startswith("NonDyn"))
    )


def substitutes() -> str:
    from models.train_step.support import SUBSTITUTES

    rows = sorted([layer_name(layer), instead] for layer, instead in SUBSTITUTES.items())
    return table(("instead of", "write"), rows)


def zoo() -> str:
    from models.federated import results
    from models.flat import flatten_params
    from models.zoo import ZOO, load

    def row(name: str) -> list[str]:
        result, params = results()[name], flatten_params(load(name).make_model()).size
        shown = [
            f"{score:.1%}" if result.metric == "accuracy" else f"{score:.4f}"
            for score in (result.int8_first, result.int8_last, result.float32_last)
        ]
        return [f"`{name}`", ZOO[name].summary, f"{params:,}", result.metric, *shown]

    head = ("model", "what", "parameters", "metric", "int8, first bundle", "int8, last release", "as float32")
    return table(head, map(row, ZOO))


PARTS: dict[str, Callable[[], str]] = {
    "shoal-edge": lambda: helps("shoal-edge", edge_agent.cli.main),
    "shoal-cloud": lambda: helps("shoal-cloud", cloud_server.cli.main),
    "shoal-fleet": lambda: helps("shoal-fleet", fleet.cli.main),
    "settings of the device": lambda: settings_table(EdgeSettings, edge_agent.settings.VARIABLE_PREFIX),
    "settings of the aggregator": lambda: settings_table(
        CloudSettings, cloud_server.settings.VARIABLE_PREFIX
    ),
    "settings of the helper": lambda: settings_table(HelperSettings),
    "options of a scenario": lambda: settings_table(Scenario),
    "metrics of the aggregator": aggregator_metrics,
    "metrics of the device": device_metrics,
    "zoo": zoo,
    "exit codes": exit_codes,
    "errors": error_tree,
    "supported layers": supported_layers,
    "substitutes": substitutes,
}
PLACES = {name: OWN_MODEL if name in ("supported layers", "substitutes") else REFERENCE for name in PARTS}


if __name__ == "__main__":
    for document in set(PLACES.values()):
        document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")
