"""What a running service does about keys: follows a rotation, lists what counts now, warns before signatures end.

Laws of the file: a new key is used here before devices are told of it, so that nothing arrives that cannot be opened;
the list is another only when keys came, went, or time made another set of them. Source: docs/architecture.md, "Keys".
"""

from __future__ import annotations

from collections.abc import Callable

from cloud_server.downlink import Downlink
from cloud_server.inbox import Inbox
from cloud_server.keys import CloudKeys
from cloud_server.release.expiry import ExpiryAlarm
from cloud_server.release.tuf_repository import TufRepository
from process.clock import Clock
from process.logs import get_logger
from wire.errors import ShoalError

_log = get_logger("cloud.keys")


class KeyWatch:
    """Follows the keys of one fleet's service; `tick` every second or so.

    Args:
        keys: gives the keys of now: the same object as long as nothing changed.
    """

    def __init__(
        self,
        keys: Callable[[], CloudKeys],
        repository: TufRepository,
        *,
        downlink: Downlink,
        inbox: Inbox,
        clock: Clock,
        tenant: str,
        fleet: str,
    ) -> None:
        self._keys = keys
        self._repository = repository
        self._downlink = downlink
        self._inbox = inbox
        self._alarm = ExpiryAlarm(repository, clock)
        self._names = {"tenant": tenant, "fleet": fleet}
        self._followed: CloudKeys | None = None
        self._complained = ""

    def tick(self) -> None:
        """Does what is due; what fails is said once, and tried again with the next tick."""
        try:
            self._follow()
            self._alarm.tick()
        except ShoalError as error:
            if str(error) != self._complained:
                self._complained = str(error)
                _log.error("keys_not_followed", error=str(error), hint=error.hint)

    def _follow(self) -> None:
        keys = self._keys()
        if keys is self._followed:
            return
        self._inbox.use_keys({key.key_id: key for key in keys.kem})
        self._downlink.use_key(keys.order)
        self._repository.set_online_keys(keys.online_json(**self._names))
        if self._followed is not None:
            kem = [key.key_id.hex() for key in keys.kem]
            _log.info("keys_changed", order=keys.order.key_id.hex(), kem=kem)
        self._followed = keys
        self._complained = ""
