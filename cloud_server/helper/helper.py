"""The helper's judgement: which question it answers, and with what.

Laws of the file: the sum of masks of a round is told for one set of devices and for no other, and only for enough
devices of the helper's own roster, each counted once and each by its own signature; what is answered is on the disk
before the answer leaves; a refusal tells no number. The aggregator's word counts for nothing but which seeds it wants
summed. Source: docs/protocol.md, clause 15.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from cloud_server.helper.store import HelperStore, RoundName
from process.clock import Clock
from process.logs import get_logger
from wire.envelope import Expect, Signer, open_sealed, peek
from wire.errors import EnvelopeError, MessageError, TrustError
from wire.helper import (
    HelperAnswer,
    HelperQuestion,
    HelperRefusal,
    MaskSeed,
    helped_context,
    helped_mask_key,
    read_question,
)
from wire.messages import MAX_SEALED_SEED_BYTES, decode_body
from wire.primitives import KemPrivateKey, VerifyKey, sha256
from wire.ring import Ring, RingVector, add_mask, ring_of

_log = get_logger("cloud.helper")


@dataclass(frozen=True, slots=True)
class _Seed:
    device: str
    seed: bytes
    min_devices: int


class Helper:
    """Answers questions of one fleet's aggregator.

    Args:
        key: what devices seal their seeds to.
        min_devices: no sum is told of fewer.
    """

    def __init__(
        self,
        store: HelperStore,
        key: KemPrivateKey,
        *,
        tenant: str,
        fleet: str,
        min_devices: int,
        clock: Clock,
    ) -> None:
        self._store, self._key, self._clock = store, key, clock
        self._tenant, self._fleet, self._min_devices = tenant, fleet, min_devices
        self._lock = threading.Lock()

    def answer(self, data: bytes) -> HelperAnswer | HelperRefusal:
        """The sum of the masks that a question names, or why it is not told. One question at a time.

        Raises:
            StorageError: (disk) what was answered cannot be kept, so nothing is answered.
        """
        try:
            question = read_question(data)
        except MessageError as error:
            return self._refuse(None, "malformed", detail=str(error))
        with self._lock:
            return self._answer(question, sha256(data))

    def _answer(self, question: HelperQuestion, digest: bytes) -> HelperAnswer | HelperRefusal:
        if (question.tenant, question.fleet) != (self._tenant, self._fleet):
            return self._refuse(question, "foreign")
        if question.terms.helper_key_id != self._key.key_id:
            return self._refuse(question, "key")
        try:
            ring = ring_of(question.terms)
        except MessageError as error:
            return self._refuse(question, "terms", detail=str(error))
        if len(question.seeds) > question.terms.members:
            return self._refuse(question, "terms", detail="more devices than the terms have room for")
        named = RoundName(question.run, question.terms.life, question.round_number)
        before = self._store.answered(named)
        if before not in (b"", digest):
            return self._refuse(question, "already_answered")
        if not before and named.life < self._store.newest_life(named.run):
            return self._refuse(question, "past_life")
        seeds, unusable = self._open_all(question)
        if unusable:
            return self._refuse(question, "unusable", tuple(unusable))
        if len(seeds) < self._min_devices:
            return self._refuse(question, "too_few", detail=f"{len(seeds)} of {self._min_devices}")
        # One that wants more company than there is must not decide for the others.
        lonely = tuple(place for place, seed in seeds.items() if seed.min_devices > len(seeds))
        if lonely:
            return self._refuse(question, "unusable", lonely)
        total = _sum_of(question, ring, list(seeds.values()))
        noted = self._store.note_answered(named, digest, devices=len(seeds), now=self._clock.now())
        if not noted:
            return self._refuse(question, "already_answered")
        facts = {"run": question.run, "round": question.round_number, "devices": len(seeds)}
        _log.info("masks_told", **facts, again=bool(before))
        return HelperAnswer(question=digest, total=total.tobytes())

    def _open_all(self, question: HelperQuestion) -> tuple[dict[int, _Seed], list[int]]:
        """The seeds of distinct devices of the roster by their places, and the places of those that are none."""
        signers = {
            key.key_id: Signer(row.device, key)
            for row in self._store.roster()
            for key in (VerifyKey(row.key),)
        }
        named = (question.tenant, question.fleet, question.run, question.round_number)
        context = helped_context(*named, question.terms)
        found: dict[int, _Seed] = {}
        devices: set[str] = set()
        unusable = []
        for place, sealed in enumerate(question.seeds):
            try:
                seed = self._open(sealed, question, context, signers)
                if seed.device in devices:
                    raise MessageError("a device twice", reason="twice")
            except (MessageError, TrustError) as error:
                unusable.append(place)
                facts = {"run": question.run, "round": question.round_number, "place": place}
                # Whose it claims to be, for the log alone.
                _log.warning(
                    "seed_unusable",
                    **facts,
                    claims=_claimed(sealed),
                    reason=str(error.facts.get("reason", error)),
                )
                continue
            found[place] = seed
            devices.add(seed.device)
        return found, unusable

    def _open(
        self, sealed: bytes, question: HelperQuestion, context: bytes, signers: dict[bytes, Signer]
    ) -> _Seed:
        opened = open_sealed(
            sealed,
            signers=signers,
            recipients={self._key.key_id: self._key},
            expect=Expect("up", self._tenant, self._fleet, MaskSeed.TYPE),
            now=self._clock.now(),
            limit_bytes=MAX_SEALED_SEED_BYTES,
        )
        header = opened.header
        if (header.run, header.round_number) != (question.run, question.round_number):
            raise EnvelopeError("a seed of another round", reason="round")
        body = decode_body(opened.body, MaskSeed, limit_bytes=MAX_SEALED_SEED_BYTES)
        if body.context != context or body.params_size != question.params_size:
            raise EnvelopeError("a seed of other terms", reason="terms")
        return _Seed(header.device, body.seed, body.min_devices)

    def _refuse(
        self,
        question: HelperQuestion | None,
        reason: str,
        unusable: tuple[int, ...] = (),
        *,
        detail: str = "",
    ) -> HelperRefusal:
        facts = {} if question is None else {"run": question.run, "round": question.round_number}
        _log.warning("question_refused", reason=reason, unusable=len(unusable), detail=detail, **facts)
        return HelperRefusal(reason=reason, unusable=unusable)


def _claimed(sealed: bytes) -> str:
    try:
        return peek(sealed).device
    except MessageError:
        return ""


def _sum_of(question: HelperQuestion, ring: Ring, seeds: list[_Seed]) -> RingVector:
    named = (question.tenant, question.fleet, question.run, question.round_number)
    context = helped_context(*named, question.terms)
    total = np.zeros(question.params_size, ring.dtype)
    for seed in seeds:
        add_mask(total, helped_mask_key(context, seed.seed))
    return total
