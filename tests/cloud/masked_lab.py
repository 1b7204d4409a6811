"""A masked round without a network: the devices' part and the cloud's book, and everything that can go wrong."""

from __future__ import annotations

import random
from collections.abc import Collection

import numpy as np

from cloud_server.secure.book import MaskBook
from cloud_server.secure.layout import Layout, choose_layout
from cloud_server.secure.unmask import unmask
from edge_agent.rounds.masking import DeviceMasking
from wire.mask_terms import MaskTerms
from wire.masking import MaskGroup, Roster
from wire.messages import Order
from wire.primitives import SigningKey
from wire.ring import RingVector, choose_ring, ring_of

PARAMS = 40
ORDER = b"o" * 16


class MaskedLab:
    """One round of `count` devices; each phase is a method that says who takes part.

    Attributes:
        vectors: what each device would send, of the ring.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int = 1,
        size: int = PARAMS,
        layout: Layout | None = None,
        round_number: int = 1,
        strangers: Collection[str] = (),
        run: str = "run",
    ) -> None:
        rng = random.Random(seed)
        names = [f"d{place:03d}" for place in range(count)]
        self.keys = {name: SigningKey(rng.randbytes(32)) for name in (*names, *strangers)}
        roster = Roster.of([(name, self.keys[name].public_bytes) for name in names])
        layout = layout or choose_layout(count, 0.0, 0.0)
        ring = choose_ring(count, size, 1.0)
        self.terms = MaskTerms(
            roster_sha256=roster.sha256,
            members=count,
            degree=layout.degree,
            threshold=layout.threshold,
            ring=ring.name,
            value_bits=ring.value_bits,
            bound=1.0,
        )
        self.ring, self.size = ring_of(self.terms), size
        self.order = Order(
            order_id=ORDER,
            kind="train",
            run=run,
            round_number=round_number,
            head_sha256=bytes(32),
            deadline=0.0,
            slot_bytes=0,
            masking=self.terms,
        )
        self.book = MaskBook(MaskGroup("t", "f", run, round_number, self.terms, roster))
        self.devices = {name: self.device(name, random.Random(f"{seed} {name}")) for name in self.keys}
        values = np.random.default_rng(seed)
        top = 1 << self.ring.value_bits
        self.vectors = {name: values.integers(0, top, size).astype(self.ring.dtype) for name in names}
        self.masked: dict[str, RingVector] = {}

    def device(self, name: str, rng: random.Random) -> DeviceMasking:
        return DeviceMasking(
            self.order, tenant="t", fleet="f", device=name, key=self.keys[name], random=rng.randbytes
        )

    @property
    def names(self) -> list[str]:
        return list(self.vectors)

    def announce(self, devices: Collection[str] | None = None) -> frozenset[str]:
        for name in self.names if devices is None else devices:
            self.book.add_keys(name, self.devices[name].keys())
        return self.book.close_keys()

    def share(self, devices: Collection[str]) -> frozenset[str]:
        for name in devices:
            self.book.add_shares(name, self.devices[name].share(self.book.roster_for(name, ORDER)))
        return self.book.close_shares()

    def deliver(self, devices: Collection[str]) -> frozenset[str]:
        for name in devices:
            self.devices[name].receive(self.book.inbox_for(name, ORDER))
            self.masked[name] = self.devices[name].mask(self.vectors[name])
        return self.book.close_updates(devices)

    def tell(self, devices: Collection[str]) -> None:
        for name in devices:
            self.book.add_opened(name, self.devices[name].open(self.book.question_for(name, ORDER)))

    def unmask(self) -> RingVector:
        updates = [(name, self.masked[name]) for name in sorted(self.book.delivered)]
        return unmask(self.book, updates, self.ring, self.size)

    def expected(self) -> RingVector:
        """The sum of the encodings of who delivered."""
        total = np.zeros(self.size, self.ring.dtype)
        for name in self.book.delivered:
            total += self.vectors[name]
        return total
