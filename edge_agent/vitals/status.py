"""What `shoal-edge status` shows: written by a running agent, put together from the disk when none runs.

Laws of the file: no keys, no samples; the file is a convenience, replaced whole and never fsynced, and what
cannot be written is left out without a word.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edge_agent.store.disk import private_opener
from process.version import VERSION
from wire.agent_versions import is_new_enough

if TYPE_CHECKING:
    from edge_agent.device_state import State
    from edge_agent.parts import Parts

STATUS_NAME: Final = "status.json"
MAX_STATUS_BYTES: Final = 2**20


def status_of(parts: Parts, state: State, status: str) -> dict[str, Any]:
    """The state of a running agent as plain values."""
    model, serving = parts.serving.current, parts.serving
    return {
        "status": status,
        "pid": os.getpid(),
        "time": parts.clock.now(),
        "device": parts.identity.device,
        "agent_version": VERSION,
        "least_agent_version": parts.least_agent,
        "is_too_old": not is_new_enough(VERSION, parts.least_agent),
        "identity_trouble": parts.identity_trouble,
        "update_key": "" if parts.identity_trouble else parts.identity.update_key.public_bytes.hex(),
        "fleet": f"{parts.identity.tenant}/{parts.identity.fleet}",
        "broker": f"{parts.identity.mqtt_host}:{parts.identity.mqtt_port}",
        "connected": state.connected,
        "phase": state.phase,
        "release": None
        if model is None
        else {
            "version": model.release_version,
            "variant": model.variant,
            "input_shape": list(model.input_shape),
            "on_probation": parts.slots.on_probation,
        },
        "requests_total": serving.total.requests,
        "errors_total": serving.total.errors,
        "by_release": {
            str(version): {"requests": counts.requests, "errors": counts.errors}
            for version, counts in sorted(serving.by_release.items())
        },
        "swaps": [
            {
                "from": swap.from_version,
                "to": swap.to_version,
                "in_flight": swap.in_flight,
                "requests": swap.counts.requests,
                "errors": swap.counts.errors,
            }
            for swap in serving.swaps
        ],
        "samples": parts.samples.counts(),
        "outbox": {"open": parts.outbox.depth(), **parts.outbox.totals()},
        "link": parts.link.as_dict(),
        "sent_bytes_total": parts.outgoing.sent_bytes_total,
        "received_bytes_total": parts.received_bytes_total,
    }


def write_status(path: Path, status: dict[str, Any]) -> None:
    """Replaces the file; a disk that is full keeps the old one."""
    replace_file(path, json.dumps(status, sort_keys=True))


def replace_file(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replaces a file that is a convenience: readers see the old one or the new one, a full disk keeps the old."""
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(OSError):
        with open(temporary, "w", encoding="utf-8", opener=private_opener) as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
        os.replace(temporary, path)


def read_status(folder: Path) -> dict[str, Any] | None:
    """What a running agent wrote last, or None when there is nothing that can be read."""
    try:
        with (folder / STATUS_NAME).open("rb") as file:
            plain = json.loads(file.read(MAX_STATUS_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) else None
