"""What a helper is told and answers in a round whose masks it sums: messages, keys, and what everything is bound to.

A device masks its update by one key stream and seals the seed of it to the helper, a second server that another party
runs. The aggregator has masked updates and no seeds, the helper seeds and no updates. Laws of the file: pure; every
seed is bound by its device's signature to tenant, fleet, run and round (the header) and to the round's terms (the
context in the body), so that it means nothing in another round or to another helper. Source: docs/protocol.md,
clause 15.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from wire.cbor import encode_canonical
from wire.enrolment import DeviceId, OnlineKey
from wire.errors import MessageError, ReleaseError, TrustError
from wire.mask_terms import MAX_HELPED_MEMBERS, HelpedTerms
from wire.messages import (
    MAX_BODY_BYTES,
    MAX_PARAMS,
    MAX_SEALED_SEED_BYTES,
    Body,
    Count,
    Digest,
    Id,
    ShortText,
    decode_body,
    encode_body,
)
from wire.primitives import KemPublicKey, hkdf, sha256

SEED_BYTES: Final = 32
MAX_QUESTION_BYTES: Final = 64 * 1024 * 1024
MAX_REFUSAL_BYTES: Final = 2 * 1024 * 1024
SUM_PATH: Final = "/v1/sum"
CBOR: Final = "application/cbor"
HELPER_JSON: Final = "helpers/helper.json"
"""The target that names the helper of a fleet. No delegated role may sign it: the offline targets key does."""


class MaskSeed(Body, frozen=True, kw_only=True):
    """`hs`, sealed to the helper: the seed of a device's mask in one round.

    Attributes:
        context: what the round is (`helped_context`).
        min_devices: the device takes part in no sum of fewer.
    """

    TYPE = "hs"
    context: Digest
    seed: Digest
    params_size: Annotated[int, Meta(ge=1, le=MAX_PARAMS)]
    min_devices: Annotated[int, Meta(ge=1, le=MAX_HELPED_MEMBERS)]


class HelperQuestion(Body, frozen=True, kw_only=True):
    """The aggregator asks for the sum of the masks of the devices whose masked updates it folds.

    Attributes:
        seeds: what each device sealed, as it came.
    """

    TYPE = "hq"
    tenant: Id
    fleet: Id
    run: Id
    round_number: Count
    terms: HelpedTerms
    params_size: Annotated[int, Meta(ge=1, le=MAX_PARAMS)]
    seeds: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_SEALED_SEED_BYTES)], ...],
        Meta(min_length=1, max_length=MAX_HELPED_MEMBERS),
    ]


class HelperAnswer(Body, frozen=True, kw_only=True):
    """The sum of the masks: [P] little-endian numbers of the ring.

    Attributes:
        question: SHA-256 of the question that this answers.
    """

    TYPE = "ha"
    question: Digest
    total: Annotated[bytes, Meta(max_length=MAX_BODY_BYTES)]


class HelperRefusal(Body, frozen=True, kw_only=True):
    """No sum was told.

    Attributes:
        reason: one word.
        unusable: places in the question whose seeds cannot be summed; a question without them may be asked.
    """

    TYPE = "hr"
    reason: ShortText
    unusable: Annotated[tuple[Count, ...], Meta(max_length=MAX_HELPED_MEMBERS)] = ()


def helped_context(tenant: str, fleet: str, run: str, round_number: int, terms: HelpedTerms) -> bytes:
    """SHA-256 of everything that a seed is bound to."""
    named = [terms.helper_key_id, terms.life, terms.members, terms.ring, terms.value_bits, terms.bound]
    return sha256(
        encode_canonical(["shoal helped", tenant, fleet, run, round_number, *named, *terms.bound_to])
    )


def helped_mask_key(context: bytes, seed: bytes) -> bytes:
    """The key of a device's mask (`wire.ring.add_mask`)."""
    return hkdf(seed, b"shoal helped mask" + context)


def read_question(data: bytes) -> HelperQuestion:
    """Reads a question; raises `MessageError` (peer) where it is none."""
    return decode_body(data, HelperQuestion, limit_bytes=MAX_QUESTION_BYTES)


class _HelperFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tenant: DeviceId
    fleet: DeviceId
    helper: OnlineKey


def helper_json(tenant: str, fleet: str, key: KemPublicKey) -> bytes:
    """The target `HELPER_JSON`, and what `shoal-cloud helper show` prints."""
    named = OnlineKey(id=key.key_id.hex(), algorithm=key.algorithm, public=key.public_bytes.hex())
    return msgspec.json.encode(_HelperFile(tenant=tenant, fleet=fleet, helper=named), order="sorted")


def read_helper_json(data: bytes, *, tenant: str, fleet: str) -> KemPublicKey:
    """The helper's key, of a file whose signature the caller has checked.

    Raises:
        ReleaseError: (peer) it is not such a file, or of another fleet.
    """
    try:
        found = msgspec.json.decode(data, type=_HelperFile, strict=True)
        key = KemPublicKey(found.helper.algorithm, bytes.fromhex(found.helper.public))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TrustError) as error:
        raise ReleaseError(f"{HELPER_JSON} is not what it should be: {error}") from error
    if (found.tenant, found.fleet) != (tenant, fleet) or found.helper.id != key.key_id.hex():
        raise ReleaseError(f"{HELPER_JSON} is that of another fleet, or names a key by another's id")
    return key


def encode_answer(answer: HelperAnswer | HelperRefusal) -> bytes:
    """As it travels, with its type in front: `ha` or `hr`."""
    return answer.TYPE.encode() + encode_body(answer)


def read_answer(data: bytes, *, question: bytes, total_bytes: int) -> HelperAnswer | HelperRefusal:
    """What a helper said.

    Args:
        question: the bytes that were asked.
        total_bytes: length of the sum that is awaited.

    Raises:
        MessageError: (peer) it is neither, or answers another question.
    """
    kind, body = data[:2], data[2:]
    if kind == HelperRefusal.TYPE.encode():
        return decode_body(body, HelperRefusal, limit_bytes=MAX_REFUSAL_BYTES)
    if kind != HelperAnswer.TYPE.encode():
        raise MessageError("the helper said nothing that is known")
    answer = decode_body(body, HelperAnswer, limit_bytes=total_bytes + 256)
    if answer.question != sha256(question) or len(answer.total) != total_bytes:
        raise MessageError("the helper answered another question")
    return answer
