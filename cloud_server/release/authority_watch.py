"""What a running service does about certificate authorities: lists those that count, reminds of one too many.

Law of the file: what devices trust is what the folder says, whoever changed it and whenever it stopped. Source:
docs/architecture.md, "Keys".
"""

from __future__ import annotations

from cloud_server.enrolment.authorities import Authorities, AuthoritySource
from cloud_server.release.expiry import DAY
from cloud_server.release.tuf_repository import TufRepository
from process.clock import Clock
from process.logs import get_logger

_log = get_logger("cloud.keys")


class AuthorityWatch:
    """Keeps the signed metadata in step with the authorities; `tick` every second or so.

    Args:
        authorities: gives those of now: the same object as long as nothing changed.
    """

    def __init__(self, authorities: AuthoritySource, repository: TufRepository, clock: Clock) -> None:
        self._authorities = authorities
        self._repository = repository
        self._clock = clock
        self._listed: Authorities | None = None
        self._remind_at = 0.0

    def tick(self) -> None:
        """Does what is due.

        Raises:
            ConfigurationError: (operator) an authority's file is open to others or damaged.
            StorageError: (operator, disk) there is no authority, or the store cannot be written.
            ReleaseError: (disk) the repository is damaged.
        """
        present = self._authorities()
        self._remind(present)
        if present is self._listed:
            return
        self._repository.set_authorities(present.bundle_pem.encode("ascii"))
        if self._listed is not None:
            _log.info("authorities_changed", trusted=[each.fingerprint[:16] for each in present.trusted])
        self._listed = present

    def _remind(self, present: Authorities) -> None:
        """Says once a day that an authority which nobody needs any more still counts."""
        now = self._clock.now()
        if len(present.trusted) > 1 and now >= max(present.may_retire_at(), self._remind_at):
            self._remind_at = now + DAY
            _log.warning("old_authority_still_counts", hint="shoal-cloud keys retire ca")
