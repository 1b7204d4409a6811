"""How one certificate authority takes over from another: by a command and a second one a week later, or at once.

Laws of the file: a takeover that stops anywhere leaves a folder that says which authorities count, and the service
lists those in the signed metadata; what is replaced stays in `ca/retired/`, where it counts for nothing. Source:
docs/architecture.md, "Keys"; docs/runbook.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloud_server.db.devices import count_certificates_before
from cloud_server.deployment import Deployment
from cloud_server.enrolment.authorities import Authorities, add_authority, retire_authorities
from cloud_server.keys import LEARN_SECONDS
from wire.errors import ConfigurationError

_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class TakenOver:
    """What came of a step.

    Attributes:
        fingerprint: SHA-256 (hex) of the newest authority's certificate.
        trusted: how many authorities count now.
        may_retire_at: when the older one can be retired without a device noticing (unix seconds); 0 where it is.
        left_behind: devices whose newest certificate is of a retired authority: they renew by their update key.
    """

    fingerprint: str
    trusted: int
    may_retire_at: float = 0.0
    left_behind: int = 0


def rotate_authority(deployment: Deployment, *, is_stolen: bool) -> TakenOver:
    """Makes the next authority, beside the one before or in its place.

    Args:
        is_stolen: the one before counts no more from now on, and neither does any certificate of it. Its key may be
            gone.

    Raises:
        ConfigurationError: (operator) another one is taking over already.
        StorageError: (disk) it cannot be written.
    """
    folder = deployment.folder.authority
    if is_stolen:
        retire_authorities(folder)  # of two, the thief may have either
    made = add_authority(folder, name=deployment.authority_name, now=deployment.clock.now())
    left = 0
    if is_stolen:
        retire_authorities(folder)
        left = _left_behind(deployment, made.since)
    present = _list(deployment)
    may_retire_at = 0.0 if is_stolen else present.may_retire_at()
    return TakenOver(made.fingerprint, len(present.trusted), may_retire_at, left)


def retire_authority(deployment: Deployment, *, now: bool) -> TakenOver:
    """Ends the overlap: the older authority counts no more, and servers show certificates of the newer one.

    Args:
        now: also before every device can have a certificate of the newer one.

    Raises:
        ConfigurationError: (operator) there is only one, or the overlap is not over.
        StorageError: (disk) it cannot be moved.
    """
    present = deployment.authorities
    if len(present.trusted) < 2:
        raise ConfigurationError(
            "there is only one authority", hint="shoal-cloud keys rotate ca makes the next"
        )
    left = _left_behind(deployment, present.trusted[0].since + LEARN_SECONDS)
    wait = present.may_retire_at() - deployment.clock.now()
    if wait > 0 and not now:
        raise ConfigurationError(
            f"{left} devices have no certificate of the new authority yet",
            hint=f"wait {wait / _DAY:.1f} days more, or say --now: they then renew by their update key",
        )
    retire_authorities(deployment.folder.authority)
    after = _list(deployment)
    return TakenOver(after.trusted[0].fingerprint, len(after.trusted), 0.0, left)


def _list(deployment: Deployment) -> Authorities:
    present = deployment.authorities
    deployment.repository.set_authorities(present.bundle_pem.encode("ascii"))
    return present


def _left_behind(deployment: Deployment, since: float) -> int:
    with deployment.database.read() as connection:
        return count_certificates_before(connection, since, deployment.clock.now())
