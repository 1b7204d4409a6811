"""The helper of a simulated fleet: the real one, in this process instead of another party's machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cloud_server.helper.helper import Helper
from cloud_server.helper.store import MEMORY, HelperStore
from process.clock import Clock
from wire.helper import HelperAnswer, HelperRefusal
from wire.primitives import KemPrivateKey, KemPublicKey


class LocalHelper:
    """A helper that answers at once; `cloud_server.secure.helper_client.AskedHelper` is its other face."""

    def __init__(self, helper: Helper, store: HelperStore, key: KemPublicKey) -> None:
        self.helper, self.store = helper, store
        self._key = key
        self._said: dict[bytes, HelperAnswer | HelperRefusal] = {}

    @property
    def key(self) -> KemPublicKey:
        """What devices seal their seeds to."""
        return self._key

    def ask(self, question: bytes, total_bytes: int) -> None:
        """Answers now; `take` has it."""
        self._said[question] = self.helper.answer(question)

    def take(self, question: bytes) -> HelperAnswer | HelperRefusal | None:
        """What came of a question, once."""
        return self._said.pop(question, None)


def open_local_helper(
    seed: int, keys: Mapping[str, bytes], *, tenant: str, fleet: str, min_devices: int, clock: Clock
) -> LocalHelper:
    """A helper with a roster.

    Args:
        seed: its key follows from it.
        keys: update key of each device.
    """
    store = HelperStore(MEMORY)
    store.add(keys.items(), clock.now())
    key = KemPrivateKey.from_bytes("x25519", hashlib.sha256(f"helper {seed}".encode()).digest())
    helper = Helper(store, key, tenant=tenant, fleet=fleet, min_devices=min_devices, clock=clock)
    return LocalHelper(helper, store, key.public_key)
