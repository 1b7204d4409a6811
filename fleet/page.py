"""The HTML page of a run: the figures, the curves as SVG pictures inside of the file, every table, no script.

Laws of the file: one self-contained file that loads nothing; whatever came from outside is escaped.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fleet.report import FleetReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#1d2733}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
.cards{display:flex;flex-wrap:wrap;gap:.8rem}.card{border:1px solid #d5dce4;border-radius:.5rem;padding:.6rem 1rem}
.card b{display:block;font-size:1.4rem}table{border-collapse:collapse;width:100%;font-size:13px}
td,th{padding:.25rem .5rem;text-align:right;border-bottom:1px solid #e5eaf0}
td:first-child,th:first-child{text-align:left}
tr.held td{background:#fff6e5}svg{width:100%;height:auto}
"""


def render_page(report: FleetReport) -> str:
    """One HTML document for the run."""
    title = html.escape(report.title)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        + _cards(report)
        + "<h2>Accuracy</h2>"
        + _accuracy_picture(report)
        + "<h2>Devices</h2>"
        + _device_picture(report)
        + _device_table(report)
        + "<h2>Rounds</h2>"
        + _round_table(report)
        + "<h2>Releases</h2>"
        + _release_table(report)
        + "<h2>Inference through every swap</h2>"
        + _swap_table(report)
        + "</body></html>\n"
    )


def _cards(report: FleetReport) -> str:
    gain = report.accuracy_last - report.accuracy_first
    values = {
        "accuracy, first bundle": f"{report.accuracy_first:.1%}",
        "accuracy, last release": f"{report.accuracy_last:.1%}",
        "gain": f"{gain * 100:+.1f} points",
        "update bytes / float32": f"{report.update_bytes_ratio:.1%}",
        "held back": str(len(report.hold_backs)),
        "inference errors": str(sum(row.errors for row in report.devices)),
        "seed": str(report.seed),
        "split": report.split_hash[:12],
        **report.facts,
    }
    if report.round_seconds_median is not None:
        values["seconds per round"] = f"{report.round_seconds_median:.2f}"
    cells = (f"<div class='card'>{html.escape(k)}<b>{html.escape(v)}</b></div>" for k, v in values.items())
    return "<div class='cards'>" + "".join(cells) + "</div>"


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = [f"<table><tr>{cells}</tr>"]
    for style, row in rows:
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in row)
        lines.append(f"<tr class='{style}'>{cells}</tr>")
    return "".join(lines) + "</table>"


def _device_table(report: FleetReport) -> str:
    head = (
        "device",
        "group",
        "windows",
        "first",
        "last",
        "updates",
        "update kB",
        "float32 kB",
        "sent kB",
        "received kB",
    )
    rows = (
        (
            "",
            (
                row.device,
                row.group,
                str(row.test_windows),
                f"{row.accuracy_first:.3f}",
                f"{row.accuracy_last:.3f}",
                str(row.updates),
                f"{row.update_bytes / 1e3:.1f}",
                f"{row.float32_bytes / 1e3:.1f}",
                f"{row.sent_bytes / 1e3:.1f}",
                f"{row.received_bytes / 1e3:.1f}",
            ),
        )
        for row in report.devices
    )
    return _table(head, rows)


def _round_table(report: FleetReport) -> str:
    head = ("round", "state", "replies", "validation accuracy", "gate", "seconds")
    rows = (
        (
            "held" if row.decision.startswith("held") else "",
            (
                str(row.number),
                row.state,
                str(row.replies),
                "" if row.validation_accuracy is None else f"{row.validation_accuracy:.3f}",
                row.decision,
                "" if row.seconds is None else f"{row.seconds:.2f}",
            ),
        )
        for row in report.rounds
    )
    return _table(head, rows)


def _release_table(report: FleetReport) -> str:
    rows = (("", (str(row.version), str(row.round_number), f"{row.accuracy:.3f}")) for row in report.releases)
    return _table(("version", "from round", "int8 accuracy on later windows"), rows)


def _swap_table(report: FleetReport) -> str:
    rows = (("", (row.device, str(row.version), str(row.requests), str(row.errors))) for row in report.swaps)
    return _table(("device", "release", "requests", "errors"), rows)


def _accuracy_picture(report: FleetReport) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    scored = [
        (row.number, row.validation_accuracy) for row in report.rounds if row.validation_accuracy is not None
    ]
    axes.plot(
        [number for number, _ in scored],
        [value for _, value in scored],
        ".-",
        label="head, validation windows",
    )
    releases = [(row.round_number, row.accuracy) for row in report.releases]
    axes.step(
        [n for n, _ in releases], [a for _, a in releases], "o-", where="post", label="release, later windows"
    )
    for row in report.hold_backs:
        axes.axvline(row.number, color="#e0a030", linewidth=0.8, alpha=0.6)
    axes.set(xlabel="round (vertical lines: held back)", ylabel="accuracy", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2)
    return _svg(figure)


def _device_picture(report: FleetReport) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    shown = report.devices[:64]
    places = range(len(shown))
    axes.bar([p - 0.2 for p in places], [row.accuracy_first for row in shown], 0.4, label="first bundle")
    axes.bar([p + 0.2 for p in places], [row.accuracy_last for row in shown], 0.4, label="last release")
    axes.set_xticks(list(places), [row.device for row in shown], rotation=60, ha="right", fontsize=7)
    axes.set(ylabel="accuracy", ylim=(0, 1))
    figure.legend(loc="outside upper right", ncols=2)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an inline SVG element, the same bytes for the same data."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "shoal", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
