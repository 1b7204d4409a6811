"""The HTML page of a run: what came out, the curves as SVG pictures inside of the file, every table, no script.

Laws of the file: one self-contained file that loads nothing; whatever came from outside is escaped; every column says
its unit, and every figure on what it was measured.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from fleet.pictures import device_picture, score_picture
from fleet.report import DeviceRow, FleetReport, ReleaseRow, SwapRow

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1d2733;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2.2rem 0 .3rem}p{margin:.3rem 0 .8rem}
.note{color:#56616e}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.7rem;margin:1rem 0}
.card{border:1px solid #d5dce4;border-radius:.5rem;padding:.5rem .9rem;font-size:13px;color:#56616e}
.card b{display:block;font-size:1.35rem;color:#1d2733}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e5eaf0;vertical-align:bottom}
th{color:#56616e;font-weight:600}td:first-child,th:first-child,.text{text-align:left}td:first-child{white-space:nowrap}
tr.held td{background:#fdeee4}tr.total td{font-weight:600;border-top:2px solid #b8c2cd}
svg{width:100%;height:auto}summary{cursor:pointer;color:#0072b2}code{overflow-wrap:anywhere}
"""

_REASONS = {
    "not_finite": "a measure was not a finite number",
    "too_large": "the int8 file was larger than allowed",
    "no_evidence": "nobody had measured it",
    "too_few_examples": "too few samples stood behind the measure",
    "operator_worse": "it was worse on the operator's own held-out samples than is allowed",
    "no_gain": "on the devices' validation windows it was not enough better than what they serve",
}

Row = tuple[str, Sequence[str]]


def render_page(report: FleetReport) -> str:
    """One HTML document for the run."""
    title = html.escape(report.title)
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'><title>{title}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        _introduction(report),
        _cards(report),
        f"<h2>{html.escape(report.metric.capitalize())} by round</h2>",
        score_picture(report),
        "<h2>Devices</h2>",
        device_picture(report),
        _device_table(report),
        "<h2>Held back</h2>",
        _hold_backs(report),
        "<h2>Releases</h2>",
        _release_table(report),
        "<h2>Rounds</h2>",
        _round_table(report),
        "<h2>Inference through every swap</h2>",
        _swaps(report),
        "<h2>How to get it again</h2>",
        _facts(report),
        "</body></html>\n",
    ]
    return "".join(parts)


def _introduction(report: FleetReport) -> str:
    windows = sum(row.test_windows for row in report.devices)
    better = "higher" if report.higher_is_better else "lower"
    return _note(
        f"Reported is the {report.metric} ({better} is better) of the int8 file that devices serve, on {windows:,} "
        "later samples of theirs that nothing was trained or chosen on. The first bundle was trained on the operator's "
        "own data alone, which are on no device; the last release came out of the fleet."
    )


def _cards(report: FleetReport) -> str:
    values = {
        f"{report.metric}, first bundle": report.shown(report.first),
        f"{report.metric}, last release": report.shown(report.last),
        "gain": f"{report.shown_gain(report.gain())} {report.gain_unit}",
        "update bytes / float32": f"{report.update_bytes_ratio:.1%}",
        "releases": str(len(report.releases)),
        "held back": str(len(report.hold_backs)),
        "inference requests": f"{report.requests:,}",
        "inference errors": f"{report.errors:,}",
    }
    if report.round_seconds_median is not None:
        values["a round, median"] = f"{report.round_seconds_median:.2f} s"
    cells = (f"<div class='card'>{html.escape(k)}<b>{html.escape(v)}</b></div>" for k, v in values.items())
    return "<div class='cards'>" + "".join(cells) + "</div>"


def _device_table(report: FleetReport) -> str:
    scores = ("device", "samples", "first", "last", f"gain, {report.gain_unit}")
    traffic = ("sent, kB", "received, kB")
    head = (*scores, "updates", "updates, kB", "as float32, kB", *traffic, "requests", "errors")
    rows = [("", _device_cells(report, row)) for row in report.devices]
    counts = ("test_windows", "updates", "update_bytes", "float32_bytes", "sent_bytes", "received_bytes")
    sums = {
        name: sum(getattr(row, name) for row in report.devices) for name in (*counts, "requests", "errors")
    }
    total = DeviceRow(device="all", group="", first=report.first, last=report.last, **sums)
    return _table(head, [*rows, ("total", _device_cells(report, total))])


def _device_cells(report: FleetReport, row: DeviceRow) -> Sequence[str]:
    sizes = (row.update_bytes, row.float32_bytes, row.sent_bytes, row.received_bytes)
    return (
        row.device,
        f"{row.test_windows:,}",
        report.shown(row.first),
        report.shown(row.last),
        report.shown_gain(report.gain(row)),
        f"{row.updates:,}",
        *(f"{size / 1e3:,.1f}" for size in sizes),
        f"{row.requests:,}",
        f"{row.errors:,}",
    )


def _hold_backs(report: FleetReport) -> str:
    if not report.hold_backs:
        return _note("None: every candidate that was judged went out.")
    rows = []
    for row in report.hold_backs:
        reason = row.decision.removeprefix("held: ")
        validation = "" if row.validation is None else report.shown(row.validation)
        rows.append(("held", (str(row.number), validation, reason, _REASONS.get(reason, ""))))
    head = ("round", f"{report.metric}, validation", "reason", "in words")
    return _note("Training went on from these heads; no device served them.") + _table(
        head, rows, text=(2, 3)
    )


def _release_table(report: FleetReport) -> str:
    kinds = list(report.releases[-1].separation) if report.releases else []
    head = (
        "version",
        "from round",
        "int8",
        "float32",
        f"int8 against float32, {report.gain_unit}",
        *(f"AUC: {kind}" for kind in kinds),
    )
    note = f"{report.metric} on all devices' later samples."
    if kinds:
        note += " AUC: the chance that the score of such a sample is above that of a usual one (0.5 says nothing)."
    return _note(note) + _table(head, (("", _release_cells(report, row)) for row in report.releases))


def _release_cells(report: FleetReport, row: ReleaseRow) -> Sequence[str]:
    origin = "first bundle" if row.round_number == 0 else str(row.round_number)
    difference = report.shown_gain(row.int8 - row.float32)
    aucs = (f"{auc:.3f}" for auc in row.separation.values())
    return (str(row.version), origin, report.shown(row.int8), report.shown(row.float32), difference, *aucs)


def _round_table(report: FleetReport) -> str:
    is_timed = report.round_seconds_median is not None
    head = (
        "round",
        "ended",
        "updates",
        f"{report.metric}, validation",
        "gate",
        *(("seconds",) if is_timed else ()),
    )
    rows = (
        (
            "held" if row.is_held else "",
            (
                str(row.number),
                row.state,
                str(row.replies),
                "" if row.validation is None else report.shown(row.validation),
                row.decision,
                *(("" if row.seconds is None else f"{row.seconds:.2f}",) if is_timed else ()),
            ),
        )
        for row in report.rounds
    )
    return _table(head, rows, text=(1, 4))


def _swaps(report: FleetReport) -> str:
    if not report.swaps:
        return _note("No requests were made during the run.")
    by_version: dict[int, list[SwapRow]] = defaultdict(list)
    for row in report.swaps:
        by_version[row.version].append(row)
    head = ("release", "devices that swapped", "requests that it answered", "errors")
    rows = (
        ("", (str(version), str(len(swaps)), *_counts(swaps)))
        for version, swaps in sorted(by_version.items())
    )
    each = (("", (row.device, str(row.version), *_counts([row]))) for row in report.swaps)
    full = _table(("device", "release", "requests", "errors"), each)
    return _table(head, rows) + f"<details><summary>every device</summary>{full}</details>"


def _counts(swaps: Sequence[SwapRow]) -> tuple[str, str]:
    return f"{sum(row.requests for row in swaps):,}", f"{sum(row.errors for row in swaps):,}"


def _facts(report: FleetReport) -> str:
    values: Mapping[str, str] = {
        "seed": str(report.seed),
        "split (SHA-256)": report.split_hash,
        **report.facts,
    }
    rows = (
        f"<tr><td>{html.escape(k)}</td><td class='text'><code>{html.escape(v)}</code></td></tr>"
        for k, v in values.items()
    )
    return f"<div class='wide'><table>{''.join(rows)}</table></div>"


def _note(text: str) -> str:
    return f"<p class='note'>{html.escape(text)}</p>"


def _table(head: Sequence[str], rows: Iterable[Row], text: Sequence[int] = ()) -> str:
    """A table; the columns in `text` are words, all others but the first are numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = (" class='text'" if at in text else "" for at in range(len(values)))
        pairs = zip(values, kinds, strict=True)
        return "".join(f"<{tag}{kind}>{html.escape(value)}</{tag}>" for value, kind in pairs)

    body = "".join(f"<tr class='{style}'>{cells('td', row)}</tr>" for style, row in rows)
    return f"<div class='wide'><table><tr>{cells('th', head)}</tr>{body}</table></div>"
