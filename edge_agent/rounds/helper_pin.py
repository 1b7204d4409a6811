"""The helper that this device masks for: by whose key it knows it.

Laws of the file: a key comes from the device's own settings, or from the file that the offline targets key of the
fleet signs, and never from the aggregator's word; the settings go before the file. What TUF said last is kept, so that
a device which starts without a network knows its helper. Source: docs/protocol.md, clause 15.4.
"""

from __future__ import annotations

from typing import Final

from edge_agent.store.storage import Database
from process.logs import get_logger
from wire.errors import ConfigurationError, ReleaseError, StorageError, TrustError
from wire.helper import read_helper_json
from wire.primitives import KemPublicKey

_log = get_logger("edge_agent")

HELPER_FACT: Final = "helper"
_ALGORITHMS: Final = {32: "x25519", 1216: "mlkem768-x25519"}


class HelperPin:
    """What one device knows of its helper. Used from the agent's loop only.

    Args:
        pinned: public key (hex) of the device's settings; empty for the one that the fleet's metadata names.

    Raises:
        ConfigurationError: (operator) the settings name what is no key.
    """

    def __init__(self, pinned: str, database: Database, *, tenant: str, fleet: str) -> None:
        self._database, self._tenant, self._fleet = database, tenant, fleet
        self.is_pinned = bool(pinned)
        self._key = _parse(pinned) if pinned else self._kept()

    @property
    def key(self) -> KemPublicKey | None:
        """To seal seeds to; None while no helper is known."""
        return self._key

    def take(self, signed: bytes) -> None:
        """Takes over what a release check found; empty where the fleet's metadata names no helper.

        A file that is signed and cannot be used leaves the device without a helper; a full disk costs only that the
        next start has to check again.
        """
        if self.is_pinned or signed == (self._database.fact(HELPER_FACT) or b""):
            return
        self._key = self._read(signed)
        try:
            self._database.set_fact(HELPER_FACT, signed)
        except StorageError as error:
            _log.warning("helper_not_kept", reason=str(error))

    def _kept(self) -> KemPublicKey | None:
        kept = self._database.fact(HELPER_FACT)
        return self._read(kept) if isinstance(kept, bytes) else None

    def _read(self, signed: bytes) -> KemPublicKey | None:
        try:
            return read_helper_json(signed, tenant=self._tenant, fleet=self._fleet) if signed else None
        except ReleaseError as error:
            _log.warning("helper_unusable", reason=str(error))
            return None


def _parse(pinned: str) -> KemPublicKey:
    try:
        public = bytes.fromhex(pinned)
        return KemPublicKey(_ALGORITHMS[len(public)], public)
    except (ValueError, KeyError, TrustError) as error:
        raise ConfigurationError(
            "training.helper_key is not the public key of a helper",
            hint="copy what `shoal-cloud helper show` prints, from who runs the helper",
        ) from error
