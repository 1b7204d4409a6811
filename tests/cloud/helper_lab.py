"""A helper, the devices of its roster, and the seeds that they seal to it: the real parts, without a network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cloud_server.helper.helper import Helper
from cloud_server.helper.store import MEMORY, HelperStore
from edge_agent.rounds.helped_round import HelpedMasking
from wire.envelope import seal
from wire.header import Header
from wire.helper import HelperAnswer, HelperQuestion, HelperRefusal, MaskSeed
from wire.mask_terms import HelpedTerms
from wire.messages import Order, encode_body
from wire.primitives import KemPrivateKey, KemPublicKey, SigningKey
from wire.ring import RingVector, choose_ring, ring_of

TENANT, FLEET = "t", "f"
PARAMS = 50
NOW = 1_700_000_000.0


class StillClock:
    def now(self) -> float:
        return NOW

    def monotonic(self) -> float:
        return 0.0


@dataclass
class Sealer:
    """Seals seeds in a device's name: what its speaker does."""

    device: str
    key: SigningKey
    seq: int = 0

    def __call__(self, body: MaskSeed, helper: KemPublicKey, *, run: str, round_number: int) -> bytes:
        self.seq += 1
        header = Header(
            type=body.TYPE,
            direction="up",
            tenant=TENANT,
            fleet=FLEET,
            device=self.device,
            epoch=1,
            seq=self.seq,
            run=run,
            round_number=round_number,
        )
        return seal(header, encode_body(body), signer=self.key, recipient=helper, pad=True)


class HelperLab:
    """Devices `d000` and so on, all of them in the helper's roster."""

    def __init__(
        self, count: int, *, min_devices: int = 3, path: Path | str = MEMORY, size: int = PARAMS, **terms: Any
    ) -> None:
        rng = random.Random(7)
        self.names = [f"d{place:03d}" for place in range(count)]
        self.keys = {name: SigningKey(rng.randbytes(32)) for name in self.names}
        self.path, self.min_devices, self.size = path, min_devices, size
        self.kem = KemPrivateKey.from_bytes("x25519", rng.randbytes(32))
        ring = choose_ring(max(count, 3), size, 1.0)
        values = {
            "members": max(count, 3),
            "ring": ring.name,
            "value_bits": ring.value_bits,
            "bound": 1.0,
            "helper_key_id": self.kem.key_id,
        }
        self.terms = HelpedTerms(**{**values, **terms})
        self.ring = ring_of(self.terms)
        drawn = np.random.default_rng(3)
        top = 1 << ring.value_bits
        self.vectors = {name: drawn.integers(0, top, size).astype(self.ring.dtype) for name in self.names}
        self.store = HelperStore(path)
        self.store.add([(name, key.public_bytes) for name, key in self.keys.items()], NOW)
        self.helper = self.open()

    def open(self) -> Helper:
        """A new process of the helper, on what is on the disk."""
        if self.path != MEMORY:
            self.store.close()
            self.store = HelperStore(self.path)
        return Helper(
            self.store,
            self.kem,
            tenant=TENANT,
            fleet=FLEET,
            min_devices=self.min_devices,
            clock=StillClock(),
        )

    def order(self, round_number: int = 1, run: str = "run", **terms: Any) -> Order:
        return Order(
            order_id=round_number.to_bytes(16, "big"),
            kind="train",
            run=run,
            round_number=round_number,
            head_sha256=bytes(32),
            deadline=0.0,
            slot_bytes=0,
            helped=msgspec.structs.replace(self.terms, **terms),
        )

    def mask(
        self,
        name: str,
        order: Order | None = None,
        *,
        key: SigningKey | None = None,
        as_device: str = "",
        min_devices: int = 3,
        helper: KemPublicKey | None = None,
    ) -> tuple[RingVector, bytes]:
        """A device's masked vector and its sealed seed.

        Args:
            key: signs in place of the device's own.
            as_device: the name that the seed claims.
            helper: the key that the device knows.
        """
        signer = key or self.keys[name]
        masking = HelpedMasking(
            order or self.order(),
            tenant=TENANT,
            fleet=FLEET,
            helper=lambda: helper or self.kem.public_key,
            random=random.Random(f"{name} {self.names} {order}").randbytes,
            min_devices=min_devices,
            seal=Sealer(as_device or name, signer),
        )
        vector = self.vectors.get(name, np.zeros(self.size, self.ring.dtype))
        return masking.mask(vector)

    def seeds(self, names: Sequence[str], order: Order | None = None) -> list[bytes]:
        return [self.mask(name, order)[1] for name in names]

    def question(
        self, seeds: Sequence[bytes], *, round_number: int = 1, run: str = "run", **changes: Any
    ) -> bytes:
        values: dict[str, Any] = {
            "tenant": TENANT,
            "fleet": FLEET,
            "run": run,
            "round_number": round_number,
            "terms": self.terms,
            "params_size": self.size,
            "seeds": tuple(seeds),
        }
        return encode_body(HelperQuestion(**{**values, **changes}))

    def ask(self, seeds: Sequence[bytes], **changes: Any) -> HelperAnswer | HelperRefusal:
        return self.helper.answer(self.question(seeds, **changes))
