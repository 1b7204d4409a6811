"""The seam to where verified releases come from. Types only, and light: the child that checks imports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edge_agent.uplink.online_keys import OnlineKeys

Held = Callable[[str], frozenset[str]]
Known = Mapping[str, bytes]
"""Bytes that are here already, by their SHA-256 (hex): what has one of these hashes is not downloaded."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a verified check found.

    Attributes:
        release_version: that the ring shall run; 0 while the ring has none.
        rollback, serial: of the ring file.
        fetched_bytes: what came over the network for this check.
        files: of that release, but those that are held; empty when it is the current one.
        signed_at, expires: of the newest metadata (unix seconds).
        helper: the file that names the fleet's helper; empty where there is none.
    """

    keys: OnlineKeys
    release_version: int
    rollback: bool = False
    serial: int = 0
    fetched_bytes: int = 0
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    signed_at: float = 0.0
    expires: float = 0.0
    helper: bytes = b""


class ReleaseSource(Protocol):
    """Where verified releases come from."""

    def fetch(self, current_version: int, held: Held, known: Known) -> Offer:
        """Checks what the ring shall run, and downloads what is not here of it when it is not `current_version`.

        Raises:
            ReleaseError: metadata or a file that does not verify.
            TransportError: the repository cannot be reached; another call goes on where this one stopped.
            StorageError: the disk is full.
        """
        ...

    def clear(self) -> None:
        """Drops what was downloaded: it is in a slot now."""
        ...
