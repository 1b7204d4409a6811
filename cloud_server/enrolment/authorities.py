"""The certificate authorities that count at a time: one, or two while the second takes over.

`ca.key` and `ca.pem` are the first, the next generation is `ca-2.key` and `ca-2.pem`; `retired/` holds those that
count no more. Laws of the file: no authority is ever overwritten; a generation is there once its key is; devices hear
of a new one by the signed metadata (`keys/authorities.pem`) before anything is signed with it, and what servers show
is signed by the one that devices have known for longest. Source: docs/architecture.md, "Keys".
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloud_server.enrolment.ca import CertificateAuthority
from cloud_server.keys import LEARN_SECONDS, OVERLAP_SECONDS
from process.clock import Clock
from wire.errors import ConfigurationError, StorageError
from wire.primitives import certificate_fingerprint

AUTHORITY_NAME: Final = "ca"
RETIRED: Final = "retired"
_GENERATION: Final = re.compile(rf"{AUTHORITY_NAME}(?:-([1-9]\d{{0,5}}))?\.(?:key|pem)")


@dataclass(frozen=True)
class Authorities:
    """The authorities of one deployment, as of one moment.

    Attributes:
        trusted: whose certificates count, newest first.
        issuing: signs devices' certificates.
        retired: SHA-256 (hex) of the certificates of those that count no more.
        changes_at: when time alone makes another set of these (unix seconds).
    """

    trusted: tuple[CertificateAuthority, ...]
    issuing: CertificateAuthority
    retired: frozenset[str] = frozenset()
    changes_at: float = float("inf")

    @property
    def door(self) -> CertificateAuthority:
        """Signs what servers show, and is what tokens pin: the one that devices have known for longest."""
        return self.trusted[-1]

    @property
    def bundle_pem(self) -> str:
        """All certificates, the door's first."""
        return "".join(each.certificate_pem for each in reversed(self.trusted))

    @property
    def fingerprints(self) -> frozenset[str]:
        """SHA-256 (hex) of every certificate that this deployment's authority ever had."""
        return self.retired | {each.fingerprint for each in self.trusted}

    def may_retire_at(self) -> float:
        """When no device that was here in time shows a certificate of the older one any more (unix seconds)."""
        return self.trusted[0].since + LEARN_SECONDS + OVERLAP_SECONDS


AuthoritySource = Callable[[], Authorities]


def only(authority: CertificateAuthority) -> AuthoritySource:
    """One authority, for good."""
    made = Authorities((authority,), authority)
    return lambda: made


class AuthorityFolder:
    """The authorities of a folder as they are now: a command may rotate them while the service runs."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._present: tuple[str, ...] = ()
        self._kept: Authorities | None = None

    def __call__(self) -> Authorities:
        """The authorities; the same object until one came or went, or time made another set.

        Raises:
            StorageError: (operator) there is none.
            ConfigurationError: (operator) a file is open to others or damaged.
        """
        with self._lock:
            present = tuple(sorted(path.name for path in self.folder.glob(f"{AUTHORITY_NAME}*.key")))
            now = self._clock.now()
            if self._kept is None or present != self._present or now >= self._kept.changes_at:
                self._kept = load_authorities(self.folder, now)
                self._present = present
            return self._kept


def load_authorities(folder: Path, now: float) -> Authorities:
    """Reads a folder; raises as `AuthorityFolder` does."""
    numbers = sorted((number for number, _ in _generations(folder, "key")), reverse=True) or [1]
    trusted = tuple(CertificateAuthority.load(folder, _name(number)) for number in numbers)
    ready = [each for each in trusted[:-1] if now >= each.since + LEARN_SECONDS]
    waiting = [each.since + LEARN_SECONDS for each in trusted[:-1] if now < each.since + LEARN_SECONDS]
    retired = frozenset(
        certificate_fingerprint(path.read_bytes()).hex() for _, path in _generations(folder / RETIRED, "pem")
    )
    issuing = ready[0] if ready else trusted[-1]
    return Authorities(trusted, issuing, retired, min(waiting, default=float("inf")))


def add_authority(folder: Path, *, name: str, now: float) -> CertificateAuthority:
    """Makes the next generation beside the ones that are there.

    Args:
        name: common name of its certificate; its number is added, so that no two are called alike.

    Raises:
        ConfigurationError: (operator) the one before has not taken over yet.
        StorageError: (disk) it cannot be written.
    """
    if len(_generations(folder, "key")) > 1:
        raise ConfigurationError(
            "a new authority is taking over already", hint="end that first: shoal-cloud keys retire ca"
        )
    used = [number for place in (folder, folder / RETIRED) for number, _ in _generations(place, "pem")]
    number = 1 + max(used, default=0)
    return CertificateAuthority.create(folder, name=f"{name[:56]} {number}", now=now, file=_name(number))


def retire_authorities(folder: Path) -> list[str]:
    """Takes every generation but the newest out of use, into `retired/`; returns what they were called.

    Raises:
        StorageError: (disk) they cannot be moved.
    """
    newest = max((number for number, _ in _generations(folder, "key")), default=0)
    place, names = folder / RETIRED, []
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        # The key goes first: without it a generation is not there.
        for kind in ("key", "pem"):
            for number, path in _generations(folder, kind):
                if number < newest:
                    path.rename(place / path.name)
                    names.append(path.stem)
    except OSError as error:
        raise StorageError(f"the old authority cannot be moved to {place}: {error.strerror}") from error
    return sorted(set(names))


def _name(number: int) -> str:
    return AUTHORITY_NAME if number == 1 else f"{AUTHORITY_NAME}-{number}"


def _generations(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """(number, file) of each generation that has such a file (`key`, `pem`)."""
    found = []
    for path in folder.glob(f"{AUTHORITY_NAME}*.{kind}"):
        match = _GENERATION.fullmatch(path.name)
        if match is not None:
            found.append((int(match[1] or 1), path))
    return sorted(found)
