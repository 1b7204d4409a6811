"""What shaped a model: the release it began with, every round since, who contributed what, and from which time.

Laws of the file: reads only; what it says of contributions is what the audit chain says, with the number of the
entry, so that `audit verify` vouches for it; a device is named as long as its name is not erased, by its pseudonym
after. A contribution's window of data is known as far as a device tells: samples that it had when it answered the
round, not before it was let in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloud_server.db.audit import AuditEntry, load_audit
from cloud_server.db.devices import load_devices
from cloud_server.db.engine import Connection
from cloud_server.db.releases import ReleaseRow, load_model, load_release, load_releases
from cloud_server.db.rounds import RoundRow, load_first_head, load_rounds
from cloud_server.rounds.chronicle import EXCHANGE_DONE, ROUND_FOLDED
from wire.errors import ConfigurationError

_MAX_GENERATIONS = 1000


def trace_lineage(connection: Connection, version: int) -> dict[str, Any]:
    """Everything that shaped a release, newest run first.

    Raises:
        ConfigurationError: (operator) there is no such release.
    """
    release = load_release(connection, version)
    if release is None:
        raise ConfigurationError(
            f"there is no release {version}", hint="`shoal-cloud release list` shows them all"
        )
    entries = _contributions(connection)
    rows = {row.pseudonym: row for row in load_devices(connection)}
    names = {pseudonym: row.device for pseudonym, row in rows.items()}
    generations: list[dict[str, Any]] = []
    shaped: dict[str, dict[str, Any]] = {}
    current: ReleaseRow | None = release
    while current is not None and current.run and len(generations) < _MAX_GENERATIONS:
        rounds = [
            _round(row, entries.get((current.run, row.number)), names)
            for row in load_rounds(connection, current.run)
            if _is_shaping(row, current, entries.get((current.run, row.number)))
        ]
        origin = _origin(connection, current)
        generations.append(
            {"release": current.version, "run": current.run, "rounds": rounds, "began_with": origin}
        )
        for each in rounds:
            _count(each["replies"], shaped)
        current = load_release(connection, origin["release"]) if origin["release"] else None
    for pseudonym, facts in shaped.items():
        facts["since"] = rows[pseudonym].enrolled_at if pseudonym in rows else None
    model = load_model(connection, release.graphs_sha256)
    return {
        "release": version,
        "model": model.name if model is not None else "",
        "graphs_sha256": release.graphs_sha256,
        "checkpoint_sha256": release.checkpoint_sha256,
        "generations": generations,
        "devices": sorted(shaped.values(), key=lambda facts: str(facts["device"])),
    }


def _contributions(connection: Connection) -> Mapping[tuple[str, int], AuditEntry]:
    found: dict[tuple[str, int], AuditEntry] = {}
    for kind in (ROUND_FOLDED, EXCHANGE_DONE):
        for entry in load_audit(connection, kind=kind):
            facts = entry.facts
            found[facts["run"], facts["round"]] = entry
    return found


def _is_shaping(row: RoundRow, release: ReleaseRow, entry: AuditEntry | None) -> bool:
    """Whether a round's replies went into a release of its run."""
    if entry is None or entry.kind == ROUND_FOLDED:
        return row.number <= release.round and bool(row.head_sha256)
    # What a ServerApp made of an exchange's replies goes out with a later exchange.
    return row.number < release.round and entry.facts["asked"] == "train"


def _round(row: RoundRow, entry: AuditEntry | None, names: Mapping[str, str]) -> dict[str, Any]:
    """One round; `entry` 0 where the chain says nothing of it (it ended before there were such entries)."""
    replies = [] if entry is None else entry.facts["replies"]
    return {
        "round": row.number,
        "entry": 0 if entry is None else entry.seq,
        "base_sha256": row.base_sha256.hex(),
        "head_sha256": row.head_sha256.hex(),
        "began": row.started,
        "replies": [
            {
                "device": names.get(reply["device"], ""),
                "pseudonym": reply["device"],
                "body_sha256": reply["body"],
                "examples": reply["examples"],
                "received": reply["received"],
            }
            for reply in replies
        ],
    }


def _origin(connection: Connection, release: ReleaseRow) -> dict[str, Any]:
    """What a run began with: an older release, or the parameters that came with the imported bundle (release 0)."""
    first = load_first_head(connection, release.run)
    sha256 = "" if first is None else first.hex()
    older = [row for row in load_releases(connection) if row.checkpoint_sha256 == sha256]
    found = next((row.version for row in older if row.version < release.version), 0)
    return {"checkpoint_sha256": sha256, "release": found}


def _count(replies: Sequence[Mapping[str, Any]], shaped: dict[str, dict[str, Any]]) -> None:
    for reply in replies:
        facts = shaped.setdefault(
            reply["pseudonym"],
            {
                "device": reply["device"] or f"(erased) {reply['pseudonym']}",
                "pseudonym": reply["pseudonym"],
                "rounds": 0,
                "examples": 0,
                "first": reply["received"],
                "until": 0.0,
            },
        )
        facts["rounds"] += 1
        facts["examples"] += reply["examples"]
        facts["first"] = min(facts["first"], reply["received"])
        facts["until"] = max(facts["until"], reply["received"])
