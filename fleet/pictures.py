"""The curves of a run as SVG pictures for the page: scores by round, and every device before and after.

Laws of the file: the same report gives the same bytes; colours are told apart by those who see few (Okabe and Ito), and
never say alone what shape or text does not.
"""

from __future__ import annotations

import html
import io
from typing import TYPE_CHECKING

from fleet.report import FleetReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST, LAST, HEAD, HELD = "#999999", "#0072B2", "#56B4E9", "#D55E00"
MAX_NAMED_DEVICES = 48
"""Of more devices, the distribution is drawn instead of each."""
_WIDTH = 9.0


def score_picture(report: FleetReport) -> str:
    """Score by round: of the head on validation windows, of what devices served on the reported ones."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(3.6)
    axes = figure.subplots()
    last_round = max((row.number for row in report.rounds), default=0)
    heads = [(row.number, row.validation) for row in report.rounds if row.validation is not None]
    axes.plot(
        [n for n, _ in heads], [v for _, v in heads], ".--", color=HEAD, label="head, validation windows"
    )
    served = [(row.round_number, row.int8) for row in report.releases]
    if served:
        # The last release is served to the end of the run.
        rounds, scores = [*(n for n, _ in served), last_round], [*(s for _, s in served), served[-1][1]]
        axes.step(rounds, scores, where="post", color=LAST, label="release, later windows (int8)")
        axes.plot(rounds[:-1], scores[:-1], "o", color=LAST)
        axes.axhline(served[0][1], color=FIRST, linewidth=1, linestyle=":", label="first bundle")
    held = [(row.number, row.validation) for row in report.hold_backs if row.validation is not None]
    if held:
        axes.plot(
            [n for n, _ in held], [v for _, v in held], "x", color=HELD, markersize=9, label="held back"
        )
    axes.set_xlabel("round")
    axes.set_xlim(-0.5, last_round + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _score_axis(axes, report)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return _svg(figure, f"{report.metric} by round")


def device_picture(report: FleetReport) -> str:
    """Every device's score before and after; the distribution of the gains where there are too many to name."""
    return _gains(report) if len(report.devices) > MAX_NAMED_DEVICES else _before_and_after(report)


def _before_and_after(report: FleetReport) -> str:
    rows = sorted(report.devices, key=lambda row: (row.last, row.device), reverse=not report.higher_is_better)
    figure = _figure(1.0 + 0.22 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    axes.hlines(places, [row.first for row in rows], [row.last for row in rows], color="#cccccc", linewidth=3)
    axes.plot([row.first for row in rows], places, "D", color=FIRST, markersize=5, label="first bundle")
    axes.plot([row.last for row in rows], places, "o", color=LAST, label="last release")
    axes.set_yticks(list(places), [row.device for row in rows], fontsize=8)
    axes.margins(y=0.02)
    axes.set_xlabel(_axis_name(report))
    _as_share(axes.xaxis, report)
    if report.metric == "accuracy":
        axes.set_xlim(0, 1.02)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return _svg(figure, f"{report.metric} of each device, first bundle and last release")


def _gains(report: FleetReport) -> str:
    figure = _figure(3.2)
    axes = figure.subplots()
    axes.hist([report.gain(row) for row in report.devices], bins=40, color=LAST)
    axes.axvline(0, color=HELD, linewidth=1)
    axes.set(xlabel=f"gain in {report.metric}, last release against first bundle", ylabel="devices")
    _as_share(axes.xaxis, report)
    return _svg(figure, f"distribution of the gains of {len(report.devices)} devices")


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _score_axis(axes: Axes, report: FleetReport) -> None:
    axes.set_ylabel(_axis_name(report))
    axes.set_ylim(bottom=0)
    if report.metric == "accuracy":
        axes.set_ylim(0, 1.02)
    _as_share(axes.yaxis, report)
    axes.grid(alpha=0.3)


def _axis_name(report: FleetReport) -> str:
    return f"{report.metric} ({'higher' if report.higher_is_better else 'lower'} is better)"


def _as_share(axis: object, report: FleetReport) -> None:
    from matplotlib.axis import Axis
    from matplotlib.ticker import PercentFormatter

    if report.metric == "accuracy" and isinstance(axis, Axis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _svg(figure: Figure, name: str) -> str:
    """The figure as an inline SVG element with a name, the same bytes for the same data."""
    import matplotlib as mpl

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "shoal", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    label = html.escape(name, quote=True)
    return svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
