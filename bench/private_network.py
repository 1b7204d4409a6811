"""A measurement in a network namespace of its own, where loopback carries nobody else's bytes and every port is free.

Law of the file: where the system allows no namespace to this user, the measurement runs on the common loopback and
every row that counts bytes says so. Source: network_namespaces(7), unshare(1).
"""

from __future__ import annotations

import fcntl
import importlib
import json
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.table import Row

_SHARED_NOTE = "; common loopback, others' bytes included"
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_REQUEST = struct.Struct("16sH14x")
_ROOT = Path(__file__).parents[1]
_UNSHARE = ("unshare", "--map-root-user", "--net")


def in_private_network(module: str, function: str, arguments: list[Any]) -> list[Row]:
    """Calls `module.function(*arguments)`, which returns rows, in a child with a loopback of its own.

    Args:
        arguments: plain values that JSON carries.

    Raises:
        subprocess.CalledProcessError: the child failed; its standard error is ours.
    """
    if not _is_allowed():
        rows: list[Row] = getattr(importlib.import_module(module), function)(*arguments)
        return [replace(row, note=row.note + _SHARED_NOTE) if "bytes" in row.name else row for row in rows]
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        answer = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.private_network", module, function, json.dumps(arguments)]
        subprocess.run([*_UNSHARE, *command, str(answer)], check=True, cwd=_ROOT)
        return [Row(**plain) for plain in json.loads(answer.read_bytes())]


def _is_allowed() -> bool:
    if shutil.which(_UNSHARE[0]) is None:
        return False
    return subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False).returncode == 0


def _raise_loopback() -> None:
    """A new namespace comes with its loopback down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, _REQUEST.pack(b"lo", 0))
        flags = _REQUEST.unpack(answer)[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, _REQUEST.pack(b"lo", flags | _IFF_UP))


def main() -> None:
    module, function, arguments, answer = sys.argv[1:]
    _raise_loopback()
    rows = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    Path(answer).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
