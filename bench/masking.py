"""One round under masks of 100 devices × 100,000 parameters with 30 drop-outs, pairwise and with a helper: CPU time of
server, device and helper (on a quiet machine the time that passes too: all of it is one thread), and all bytes against
float32."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np

from bench.table import Row
from cloud_server.helper.helper import Helper
from cloud_server.helper.store import MEMORY, HelperStore
from cloud_server.secure.book import MaskBook
from cloud_server.secure.layout import choose_layout
from cloud_server.secure.unmask import unmask
from edge_agent.rounds.helped_round import HelpedMasking
from edge_agent.rounds.masking import DeviceMasking
from process.clock import SystemClock
from wire.envelope import seal, sign
from wire.errors import RoundError
from wire.header import Header
from wire.helper import HelperAnswer, HelperQuestion, MaskSeed
from wire.mask_terms import HelpedTerms, MaskTerms
from wire.masking import MaskGroup, Roster
from wire.messages import Body, Order, Update, encode_body
from wire.primitives import KemPrivateKey, KemPublicKey, SigningKey
from wire.ring import RingVector, choose_ring, ring_of

_DEVICES: Final = 100
_PARAMS: Final = 100_000
_DROPOUT: Final = 0.3
_COLLUDING: Final = 0.1
_ORDER: Final = bytes(16)


@dataclass
class _Cost:
    """Seconds of the server, of each device by step, and bytes of one device by direction."""

    server_seconds: float = 0.0
    unmask_seconds: float = 0.0
    device_seconds: dict[str, list[float]] = field(default_factory=dict)
    up_bytes: list[int] = field(default_factory=list)
    down_bytes: list[int] = field(default_factory=list)

    def server(self, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        value = work()
        self.server_seconds += time.process_time() - start
        return value

    def device(self, step: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        value = work()
        self.device_seconds.setdefault(step, []).append(time.process_time() - start)
        return value

    @property
    def device_total(self) -> float:
        return sum(statistics.median(times) for times in self.device_seconds.values())


class _Round:
    """The devices and the cloud's book of one round."""

    def __init__(self) -> None:
        rng = random.Random(1)
        self.keys = {f"d{place:03d}": SigningKey(rng.randbytes(32)) for place in range(_DEVICES)}
        roster = Roster.of([(name, key.public_bytes) for name, key in self.keys.items()])
        layout = choose_layout(_DEVICES, _DROPOUT, _COLLUDING)
        ring = choose_ring(_DEVICES, _PARAMS, 1.0)
        self.terms = MaskTerms(
            roster_sha256=roster.sha256,
            members=_DEVICES,
            degree=layout.degree,
            threshold=layout.threshold,
            ring=ring.name,
            value_bits=ring.value_bits,
            bound=ring.bound,
        )
        self.ring = ring_of(self.terms)
        order = _order_of(self)
        self.book = MaskBook(MaskGroup("t", "f", "bench", 1, self.terms, roster))
        self.devices = {
            name: DeviceMasking(order, tenant="t", fleet="f", device=name, key=key, random=os.urandom)
            for name, key in self.keys.items()
        }
        values = np.random.default_rng(1)
        top = 1 << self.ring.value_bits
        self.vectors = {name: values.integers(0, top, _PARAMS).astype(self.ring.dtype) for name in self.keys}
        self.kem = KemPrivateKey.generate()

    def sealed_bytes(self, body: Body) -> int:
        header = Header(
            type=body.TYPE, direction="up", tenant="t", fleet="f", device="d000", epoch=1, seq=1, run="bench",
            round_number=1,
        )  # fmt: skip
        key = self.keys["d000"]
        return len(seal(header, encode_body(body), signer=key, recipient=self.kem.public_key, pad=True))

    def signed_bytes(self, body: Body) -> int:
        header = Header(
            type=body.TYPE, direction="down", tenant="t", fleet="f", device="d000", epoch=1, seq=1
        )
        return len(sign(header, encode_body(body), signer=self.keys["d000"]))


def _order_of(one: _Round) -> Order:
    return Order(
        order_id=_ORDER,
        kind="train",
        run="bench",
        round_number=1,
        head_sha256=bytes(32),
        deadline=0.0,
        slot_bytes=0,
        masking=one.terms,
    )


def measure() -> list[Row]:
    """Time of the server, time of a device, and bytes beside those of the masked vector.

    Raises:
        RoundError: the sum is not the sum.
    """
    cost, one = _Cost(), _Round()
    _play(one, cost, lost=sorted(one.keys)[::3][: int(_DROPOUT * _DEVICES)])
    vector_bytes = _PARAMS * one.ring.dtype.itemsize
    terms = one.terms
    setting = f"{_DEVICES} devices, {_PARAMS} parameters, 30 lost, {terms.degree} neighbours, {terms.threshold} shares"
    steps = ", ".join(
        f"{name} {statistics.median(t) * 1e3:.1f} ms" for name, t in cost.device_seconds.items()
    )
    up, down = sum(cost.up_bytes), sum(cost.down_bytes)
    return [
        Row("masked round: server", cost.server_seconds, "<= 2", "s",
            f"{setting}; of it unmasking {cost.unmask_seconds:.2f} s"),
        Row("masked round: one device", cost.device_total, "", "s", steps),
        Row("masked round: bytes up above the masked vector", 100 * up / vector_bytes, "<= 3", "%",
            f"{up} B sealed in 3 messages over {vector_bytes} B"),
        Row("masked round: bytes down, roster, shares and question", 100 * down / vector_bytes, "", "%",
            f"{down} B signed"),
        Row("masked round: all bytes up / float32", _whole(one, vector_bytes, b"", up) / (4 * _PARAMS), "", "x",
            f"{terms.ring}; the update sealed and padded, and all other messages"),
        Row("masked round: all bytes, up and down / float32",
            (_whole(one, vector_bytes, b"", up) + down) / (4 * _PARAMS), "", "x", f"{terms.ring}"),
        *_helped_rows(one),
    ]  # fmt: skip


def _play(one: _Round, cost: _Cost, lost: Iterable[str]) -> None:
    book, names = one.book, sorted(one.keys)
    for name in names:
        keys = cost.device("keys", one.devices[name].keys)
        cost.server(partial(book.add_keys, name, keys))
    cost.up_bytes.append(one.sealed_bytes(keys))
    cost.server(book.close_keys)
    for name in names:
        roster = cost.server(partial(book.roster_for, name, _ORDER))
        shares = cost.device("shares", partial(one.devices[name].share, roster))
        cost.server(partial(book.add_shares, name, shares))
    cost.up_bytes.append(one.sealed_bytes(shares))
    cost.down_bytes.append(one.signed_bytes(roster))
    cost.server(book.close_shares)
    left = sorted(set(names) - set(lost))
    masked = [(name, _mask(one, cost, name)) for name in left]
    cost.server(lambda: book.close_updates(left))
    for name in left:
        question = cost.server(partial(book.question_for, name, _ORDER))
        told = cost.device("answer", partial(one.devices[name].open, question))
        cost.server(partial(book.add_opened, name, told))
    cost.up_bytes.append(one.sealed_bytes(told))
    cost.down_bytes.append(one.signed_bytes(question))
    before = cost.server_seconds
    total = cost.server(lambda: unmask(book, masked, one.ring, _PARAMS))
    cost.unmask_seconds = cost.server_seconds - before
    wanted = np.zeros(_PARAMS, one.ring.dtype)
    for name in left:
        wanted += one.vectors[name]
    if not np.array_equal(total, wanted):
        raise RoundError("the unmasked sum is not the sum of the encodings")


def _mask(one: _Round, cost: _Cost, name: str) -> RingVector:
    inbox = cost.server(lambda: one.book.inbox_for(name, _ORDER))
    if not cost.down_bytes[1:]:
        cost.down_bytes.append(one.signed_bytes(inbox))

    def work() -> RingVector:
        one.devices[name].receive(inbox)
        return one.devices[name].mask(one.vectors[name])

    masked: RingVector = cost.device("mask", work)
    return masked


def _whole(one: _Round, vector_bytes: int, sealed_seed: bytes, other_bytes: int = 0) -> int:
    """Bytes that a device sends in all: its update, sealed and padded, and what comes beside it."""
    update = Update(
        update_id=bytes(16), order_id=_ORDER, run="bench", round_number=1, base_sha256=bytes(32), num_examples=1,
        codec=one.ring.name, params_size=_PARAMS, payload=bytes(vector_bytes), sealed_seed=sealed_seed,
    )  # fmt: skip
    return one.sealed_bytes(update) + other_bytes


def _helped_rows(one: _Round) -> list[Row]:
    """The same fleet, with a helper in place of the neighbours.

    Raises:
        RoundError: the sum is not the sum.
    """
    kem, store = KemPrivateKey.generate(), HelperStore(MEMORY)
    store.add([(name, key.public_bytes) for name, key in one.keys.items()], 0.0)
    helper = Helper(store, kem, tenant="t", fleet="f", min_devices=10, clock=SystemClock())
    terms = HelpedTerms(
        members=_DEVICES,
        ring=one.ring.name,
        value_bits=one.ring.value_bits,
        bound=one.ring.bound,
        helper_key_id=kem.key_id,
    )
    order = msgspec.structs.replace(_order_of(one), masking=None, helped=terms)
    left = sorted(one.keys)[: _DEVICES - int(_DROPOUT * _DEVICES)]
    cost, sent = _Cost(), []
    for name in left:
        masking = HelpedMasking(
            order, tenant="t", fleet="f", helper=lambda: kem.public_key, random=os.urandom, min_devices=10,
            seal=partial(_seal_seed, name, one.keys[name]),
        )  # fmt: skip
        sent.append(cost.device("mask and seal", partial(masking.mask, one.vectors[name])))
    question = encode_body(
        HelperQuestion(
            tenant="t", fleet="f", run="bench", round_number=1, terms=terms, params_size=_PARAMS,
            seeds=tuple(sealed for _, sealed in sent),
        )
    )  # fmt: skip
    start = time.process_time()
    answer = helper.answer(question)
    helper_seconds = time.process_time() - start
    if not isinstance(answer, HelperAnswer):
        raise RoundError(f"the helper told nothing: {answer.reason}")
    total = cost.server(lambda: _unmasked(one, [masked for masked, _ in sent], answer.total))
    if not np.array_equal(total, sum((one.vectors[name] for name in left), np.zeros_like(total))):
        raise RoundError("the sum that the helper unmasked is not the sum of the encodings")
    vector_bytes, sealed_seed = len(answer.total), sent[0][1]
    whole = _whole(one, vector_bytes, sealed_seed)
    between = len(question) + len(answer.total)
    setting = f"{len(left)} of {_DEVICES} devices delivered, {_PARAMS} parameters"
    return [
        Row("round with a helper: aggregator", cost.server_seconds, "", "s", setting),
        Row("round with a helper: helper", helper_seconds, "", "s", setting),
        Row("round with a helper: one device", cost.device_total, "", "s", "mask and seal, one message"),
        Row("round with a helper: bytes up above the masked vector", 100 * len(sealed_seed) / vector_bytes,
            "<= 3", "%", f"{len(sealed_seed)} B sealed seed over {vector_bytes} B"),
        Row("round with a helper: all bytes up / float32", whole / (4 * _PARAMS), "", "x",
            f"{one.ring.name}; the update with its seed, sealed and padded"),
        Row("round with a helper: between the servers / updates", between / (len(left) * vector_bytes), "", "x",
            f"question {len(question)} B, answer {len(answer.total)} B"),
    ]  # fmt: skip


def _unmasked(one: _Round, masked: list[RingVector], masks: bytes) -> RingVector:
    total = np.zeros(_PARAMS, one.ring.dtype)
    for vector in masked:
        np.add(total, vector, out=total)
    np.subtract(total, np.frombuffer(masks, one.ring.dtype), out=total)
    return total


def _seal_seed(
    name: str, key: SigningKey, body: MaskSeed, helper: KemPublicKey, *, run: str, round_number: int
) -> bytes:
    header = Header(
        type=body.TYPE, direction="up", tenant="t", fleet="f", device=name, epoch=1, seq=1, run=run,
        round_number=round_number,
    )  # fmt: skip
    return seal(header, encode_body(body), signer=key, recipient=helper, pad=True)
