"""What lies in a state folder and cannot be what it is called: a folder in the place of a file, a file in that of one.

Laws of the file: it goes to the quarantine under its name before anything is opened, so that no agent fails to start
over it; what is of the right kind and wrong inside is found by whoever reads it. Source: docs/architecture.md, "The
agent".
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from edge_agent.store.quarantine import FOLDER_NAME, Quarantine
from process.logs import get_logger

_log = get_logger("edge_agent.store.foreign")

_FOLDERS: Final = ("identity", "at_rest", "slots", "slots/graphs", "tuf", "selftest")
_FILES: Final = (
    "FORMAT",
    "EPOCH",
    "ANSWERING",
    "agent.db",
    "agent.db-wal",
    "agent.db-shm",
    "at_rest/ring",
    "slots/STATE.json",
    "identity/enrolment.json",
    "identity/ca.pem",
    "identity/certificate.pem",
    "identity/root.json",
    "identity/tls.key",
    "identity/update.key",
    "status.json",
)
_ASIDE: Final = ".foreign"


def put_foreign_away(root: Path) -> int:
    """Looks through a state folder; returns how much went to its quarantine, in the clear (`Quarantine.seal_plain`)."""
    aside = root / _ASIDE
    if _is_other(root / FOLDER_NAME, is_folder=True):
        with contextlib.suppress(OSError):
            os.replace(root / FOLDER_NAME, aside)
    quarantine = Quarantine(root / FOLDER_NAME)
    if os.path.lexists(aside):
        quarantine.take(aside, "lay where the quarantine belongs")
    for names, is_folder in ((_FOLDERS, True), (_FILES, False)):
        for name in names:
            if _is_other(root / name, is_folder=is_folder):
                reason = f"{name} is not a {'folder' if is_folder else 'file'}"
                quarantine.take(root / name, reason)
                _log.error("foreign_file", name=name, reason=reason)
    return quarantine.kept_total


def _is_other(path: Path, *, is_folder: bool) -> bool:
    """A link to what is right is right; one to nothing is not."""
    if not os.path.lexists(path):
        return False
    return not (path.is_dir() if is_folder else path.is_file())
