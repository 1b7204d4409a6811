"""What a campaign has done, as its file keeps it, and the table that people and scripts read.

Laws of the file: the table counts nothing that the plays did not; every wait is in the file, so that another summary of
them needs no other campaign.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from fleet.real_chaos.scenario import BrokerKind

FORMAT: Final = 1
_KEPT_COMPLAINTS: Final = 20


class Play(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the file: `Outcome.to_plain`."""

    kind: str
    seed: int
    broker: str
    faults: Annotated[int, Meta(ge=0)]
    idle: int
    struck: dict[str, int]
    updates: int
    lost: int
    doubled: int
    altered: int
    owed: int
    places: dict[str, int]
    drains: list[float]
    recoveries: list[float]
    rounds: int
    refusals: int
    seconds: float
    violations: list[str]


class CampaignFile(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a campaign goes on from."""

    format: int = FORMAT
    seed: int
    brokers: list[str]
    kinds: list[str]
    plays: list[Play] = msgspec.field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignPlan:
    """What a campaign is asked for.

    Attributes:
        faults: in all, over all kinds by their weights.
        seconds: after so long no further fault is begun, for this time.
        seed: of the first play; the next has the next.
        kinds: names of scenarios.
        brokers: each play takes the next of them.
    """

    faults: int
    seconds: float
    seed: int
    kinds: tuple[str, ...]
    brokers: tuple[BrokerKind, ...]


@dataclass(slots=True)
class RealReport:
    """The table of a campaign."""

    plan: CampaignPlan
    plays: Sequence[Play]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def violations(self) -> list[str]:
        """All that must not be, with the play in which it was."""
        return [
            f"{play.kind}, seed {play.seed}, {play.broker}: {what}"
            for play in self.plays
            for what in play.violations
        ]

    def total(self, name: str, kind: str = "") -> int:
        """A count over all plays, or over those of a kind."""
        return sum(getattr(play, name) for play in self.plays if kind in ("", play.kind))

    def drains(self, kind: str = "", name: str = "drains") -> list[float]:
        """All waits, the shortest first."""
        return sorted(wait for play in self.plays if kind in ("", play.kind) for wait in getattr(play, name))

    def to_json(self) -> str:
        """One object."""
        kinds = {kind: self._row(kind) for kind in self.plan.kinds if kind not in self.skipped}
        struck: Counter[str] = Counter()
        for play in self.plays:
            struck.update(play.struck)
        plain: dict[str, Any] = {
            "seed": self.plan.seed,
            **self._row(""),
            "kinds": kinds,
            "skipped": dict(self.skipped),
            "struck": dict(sorted(struck.items())),
            "plays": len(self.plays),
            "complaints": self.violations[:_KEPT_COMPLAINTS],
        }
        return msgspec.json.format(msgspec.json.encode(plain), indent=2).decode() + "\n"

    def _row(self, kind: str) -> dict[str, Any]:
        drains, recoveries = self.drains(kind), self.drains(kind, "recoveries")
        return {
            "faults": self.total("faults", kind),
            "updates": self.total("updates", kind),
            "lost": self.total("lost", kind),
            "doubled": self.total("doubled", kind),
            "altered": self.total("altered", kind),
            "violations": sum(len(play.violations) for play in self.plays if kind in ("", play.kind)),
            "rounds": self.total("rounds", kind),
            "refused_inferences": self.total("refusals", kind),
            "drain_seconds": {
                "median": _quantile(drains, 0.5),
                "p95": _quantile(drains, 0.95),
                "most": _most(drains),
            },
            "recovery_seconds": {"median": _quantile(recoveries, 0.5), "most": _most(recoveries)},
            "seconds": round(sum(play.seconds for play in self.plays if kind in ("", play.kind)), 1),
        }


def render_real(report: RealReport) -> str:
    """For people."""
    heads = (
        "kind",
        "faults",
        "updates",
        "lost",
        "doubled",
        "altered",
        "drained in",
        "at most",
        "restarts and all",
    )
    rows: list[tuple[str, ...]] = [heads]
    kinds = [kind for kind in report.plan.kinds if any(play.kind == kind for play in report.plays)]
    for kind in (*kinds, ""):
        drains, recoveries = report.drains(kind), report.drains(kind, "recoveries")
        counts = (
            str(report.total(name, kind)) for name in ("faults", "updates", "lost", "doubled", "altered")
        )
        waits = (_seconds(_quantile(drains, 0.5)), _seconds(_most(drains)), _seconds(_most(recoveries)))
        rows.append((kind or "all", *counts, *waits))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in pairs)
        for pairs in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
    lines += ["", *(f"violation: {what}" for what in report.violations[:_KEPT_COMPLAINTS])]
    return "\n".join(lines).rstrip() + "\n"


def _quantile(values: Sequence[float], share: float) -> float:
    return 0.0 if not values else round(values[min(len(values) - 1, int(share * len(values)))], 3)


def _most(values: Sequence[float]) -> float:
    return round(max(values, default=0.0), 3)


def _seconds(value: float) -> str:
    return f"{value:.1f} s"
