"""The messages that devices and cloud exchange, as frozen, closed structures.

Laws of the file: types only, no I/O, no keys; an unknown key, a wrong type or a value out of bounds is a
`MessageError`; every string, list and byte string has a cap. Source: docs/protocol.md, clause 3.

A message's body is canonical CBOR of the structure (`encode_body`); who sent it, to whom, for which round
and how fresh it is stands in the envelope's `Header`, never in the body. Up: `Birth` travels signed and
clear, everything else a device says is sealed. Down: everything is signed and clear but the answer of an
escalation, which is sealed.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta, Struct

from wire.cbor import decode_canonical, encode_canonical
from wire.errors import MessageError
from wire.mask_terms import MAX_MASK_DEGREE, MAX_MASK_MEMBERS, HelpedTerms, MaskTerms, RingName, RingTerms

ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}\Z"
MAX_CHUNKS = 4096
MAX_PARAMS = 2**26
MAX_BODY_BYTES = 256 * 1024 * 1024

Id = Annotated[str, Meta(pattern=ID_PATTERN)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
DigestOrNone = Annotated[bytes, Meta(max_length=32)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e11)]
Spread = Annotated[float, Meta(ge=0.0, le=86_400.0)]
Text = Annotated[str, Meta(max_length=512)]
ShortText = Annotated[str, Meta(max_length=64)]
Metrics = Annotated[dict[ShortText, float], Meta(max_length=32)]
CodecName = Literal["fp32", "fp16", "int8", "int4", "int2", "sign", "dithered"]

CheckName = Literal["disk", "clock", "certificate", "broker", "model", "heat", "backlog"]
RemedyName = Literal["roll_back", "pause_training", "trim", "renew", "reconnect"]

CODEC_NAMES: tuple[str, ...] = get_args(CodecName)
MAX_SEALED_SEED_BYTES = 4096


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all bodies. `TYPE` is the header's `type`.

    A field that has its default value does not travel, so that a new one does not disturb an older receiver.
    """

    TYPE: ClassVar[str] = ""


class BlobRef(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Content-addressed bytes that travel in chunks: the hashes of the chunks, so each is checked on
    arrival."""

    sha256: Digest
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_BODY_BYTES)]
    chunk_bytes: Annotated[int, Meta(ge=1024, le=122_880)]
    chunk_sha256: Annotated[tuple[Digest, ...], Meta(max_length=MAX_CHUNKS)]


class Birth(Body, frozen=True, kw_only=True):
    """`st/{device}`: the device is here (retained), left politely, or was lost (the last will)."""

    TYPE: ClassVar[str] = "st"
    status: Literal["online", "offline", "lost"]
    boot_id: Nonce
    agent_version: ShortText
    wire_versions: tuple[Count, Count]
    machine: ShortText = ""
    cores: Count = 0
    memory_bytes: Count = 0
    codecs: Annotated[tuple[CodecName, ...], Meta(max_length=16)] = ()
    release_version: Count = 0
    release_sha256: DigestOrNone = b""


class Telemetry(Body, frozen=True, kw_only=True):
    """`tm/{device}`, sealed, QoS 0: heartbeat and counters since boot."""

    TYPE: ClassVar[str] = "tm"
    uptime_seconds: Seconds
    release_version: Count
    requests_total: Count
    errors_total: Count
    samples: Count
    labelled_samples: Count
    outbox: Count
    rss_bytes: Count = 0
    sent_bytes_total: Count = 0
    received_bytes_total: Count = 0
    unwell: Annotated[tuple[CheckName, ...], Meta(max_length=16)] = ()
    remedies: Annotated[dict[RemedyName, Count], Meta(max_length=16)] = {}


class InferenceReport(Body, frozen=True, kw_only=True):
    """`ir/{device}`, sealed, QoS 0: what the served model answered since the last report."""

    TYPE: ClassVar[str] = "ir"
    release_version: Count
    requests: Count
    errors: Count
    latency_p50_seconds: Seconds
    latency_p99_seconds: Seconds
    confidence_mean: float
    label_counts: Annotated[tuple[Count, ...], Meta(max_length=4096)] = ()
    feedback_correct: Count = 0
    feedback_total: Count = 0


class TrainConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a device trains in one round. The device bounds each value again by its own policy."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    epochs: Annotated[int, Meta(ge=1, le=100)] = 1
    batch_size: Annotated[int, Meta(ge=1, le=4096)] = 16
    max_steps: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    learning_rate: Annotated[float, Meta(gt=0.0, le=10.0)] = 0.05
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    proximal_mu: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    clipping_norm: Annotated[float, Meta(gt=0.0, le=1e9)] = 10.0
    codec: CodecName = "dithered"
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


class HeadPatch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A head as a difference to an earlier one: the patch (clause 12) and the checkpoint that it is made on."""

    base_sha256: Digest
    blob: BlobRef


class Invitation(Body, frozen=True, kw_only=True):
    """`rd/{round}` and retained `rd/now`: what a round's devices share. An idle fleet has `open=False`
    there.

    Attributes:
        head: the checkpoint to train on; its hash decides, whatever way it came.
        head_on_need: the head's chunks leave only for devices that ask (`Need`): those that can make it from
        `patch`, or hold it, need none. patch: leads to the head from a checkpoint that most devices hold.
    """

    TYPE: ClassVar[str] = "rd"
    run: Id
    round_number: Count
    open: bool
    deadline: Seconds
    graphs_sha256: Digest
    head: BlobRef
    train: TrainConfig
    head_on_need: bool = False
    patch: HeadPatch | None = None


class Order(Body, frozen=True, kw_only=True):
    """`cm/{device}`: train or evaluate the round's head; doubles as the grant of an upload slot.

    With `masking`, the update is sent under masks, and the device's keys follow its answer (`MaskKeys`); with
    `helped`, under one whose seed is sealed to a helper. Never both.
    `overrides` are the values of `TrainConfig` that differ for this device. A repeated order (same
    `order_id`) is answered again and never trained twice.
    """

    TYPE: ClassVar[str] = "cm"
    order_id: Nonce
    kind: Literal["train", "evaluate"]
    run: Id
    round_number: Count
    head_sha256: Digest
    deadline: Seconds
    slot_bytes: Annotated[int, Meta(ge=0, le=MAX_BODY_BYTES)]
    overrides: Annotated[dict[ShortText, float | int | ShortText], Meta(max_length=16)] = {}
    masking: MaskTerms | None = None
    helped: HelpedTerms | None = None

    @property
    def ring_terms(self) -> RingTerms | None:
        """How the update becomes numbers of a ring; None when it travels without masks."""
        return self.masking or self.helped


class Join(Body, frozen=True, kw_only=True):
    """`jn/{device}`, sealed: the answer to an `Order`."""

    TYPE: ClassVar[str] = "jn"
    order_id: Nonce
    accepted: bool
    reason: Text = ""


class Update(Body, frozen=True, kw_only=True):
    """`up/…`, sealed: the answer to a train order. Update = local − global, over the flat parameter vector.

    `payload` is `codec`'s encoding of float32 [P]; `buffers` float16 little-endian [Q] (the local statistics
    themselves, not a difference). `update_id` survives re-sealing. Under masks (`ring16`, `ring32`) the payload
    is [P] little-endian numbers of the ring, `num_examples` is 1, and there are neither buffers nor metrics;
    `sealed_seed` is that of the mask, for the helper (clause 15), or empty.
    """

    TYPE: ClassVar[str] = "up"
    update_id: Nonce
    order_id: Nonce
    run: Id
    round_number: Count
    base_sha256: Digest
    num_examples: Annotated[int, Meta(ge=1, le=2**31)]
    codec: CodecName | RingName
    params_size: Annotated[int, Meta(ge=1, le=MAX_PARAMS)]
    payload: Annotated[bytes, Meta(max_length=MAX_BODY_BYTES)]
    buffers: Annotated[bytes, Meta(max_length=2 * MAX_PARAMS)] = b""
    metrics: Metrics = {}
    sealed_seed: Annotated[bytes, Meta(max_length=MAX_SEALED_SEED_BYTES)] = b""


class Evaluation(Body, frozen=True, kw_only=True):
    """`up/…`, sealed: the answer to an evaluate order (no parameters travel)."""

    TYPE: ClassVar[str] = "ev"
    update_id: Nonce
    order_id: Nonce
    run: Id
    round_number: Count
    base_sha256: Digest
    num_examples: Annotated[int, Meta(ge=1, le=2**31)]
    metrics: Metrics


class Receipt(Body, frozen=True, kw_only=True):
    """`ak/{device}`: the verdict on an update, sent after the cloud's transaction committed.

    Attributes:
        update_id: the update that the verdict ends (zeros while chunks are still missing and it is unknown).
        transfer: SHA-256 of the whole sealed message, as the device sent it.
        verdict: `stored` and `duplicate` and `refused` end the outbox row; `missing` asks for `missing`
        chunks.
        row: the number under which the cloud committed the update; 0: it keeps no backups, and promises no more than
            the commit.
        durable: every update that the cloud committed under a number up to here is in a backup.
    """

    TYPE: ClassVar[str] = "ak"
    update_id: Nonce
    transfer: Digest
    verdict: Literal["stored", "duplicate", "refused", "missing"]
    reason: Text = ""
    missing: Annotated[tuple[Count, ...], Meta(max_length=MAX_CHUNKS)] = ()
    durable: Count = 0
    row: Count = 0


class Announcement(Body, frozen=True, kw_only=True):
    """`md/{channel}`, retained: there is a release; `timestamp` is TUF's timestamp.json, so a device knows at once.

    `keys_version` is the sum of the versions of the signed metadata that lists keys (root, targets, `keys`): a device
    that knows another looks at once. `min_agent_version` is the oldest agent that is asked; empty for any.
    `reconnect_seconds` and `spread_seconds` are what the fleet is asked to spread its returns to the broker and its
    downloads over; 0: as each likes."""

    TYPE: ClassVar[str] = "md"
    channel: Id
    release_version: Count
    timestamp: Annotated[bytes, Meta(max_length=65_536)]
    keys_version: Annotated[int, Meta(ge=0, le=2**53)] = 0
    min_agent_version: ShortText = ""
    reconnect_seconds: Spread = 0.0
    spread_seconds: Spread = 0.0


class Need(Body, frozen=True, kw_only=True):
    """`nd/{device}/{sha}`, signed: bitmap (LSB first) of the chunks of a blob that the device still lacks."""

    TYPE: ClassVar[str] = "nd"
    sha256: Digest
    bitmap: Annotated[bytes, Meta(min_length=1, max_length=MAX_CHUNKS // 8)]


class MaskKeys(Body, frozen=True, kw_only=True):
    """`jn/{device}`, sealed: the keys of a device for one masked round.

    Attributes:
        mask_key, channel_key: X25519; pairwise masks are agreed with one, shares are sealed with the other.
        commitment: binds the device to the seed of its own mask.
        signature: Ed25519 by its update key over `wire.masking.keys_statement`.
    """

    TYPE: ClassVar[str] = "mk"
    order_id: Nonce
    mask_key: Digest
    channel_key: Digest
    commitment: Digest
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class MaskMember(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A device that a round was opened with, and its update key."""

    device: Id
    key: Digest


class MaskPeer(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The keys of a neighbour, as it signed them."""

    device: Id
    mask_key: Digest
    channel_key: Digest
    commitment: Digest
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class MaskRoster(Body, frozen=True, kw_only=True):
    """`cm/{device}`: all members of a masked round, and the keys of those neighbours that sent theirs."""

    TYPE: ClassVar[str] = "mr"
    order_id: Nonce
    members: Annotated[tuple[MaskMember, ...], Meta(max_length=MAX_MASK_MEMBERS)]
    peers: Annotated[tuple[MaskPeer, ...], Meta(max_length=MAX_MASK_DEGREE)]


MaskPieces = Annotated[tuple[Annotated[bytes, Meta(max_length=64)], ...], Meta(max_length=MAX_MASK_DEGREE)]


class MaskShares(Body, frozen=True, kw_only=True):
    """`jn/{device}`, sealed: what the device seals to each of its neighbours, in their order; empty for one
    without keys."""

    TYPE: ClassVar[str] = "ms"
    order_id: Nonce
    pieces: MaskPieces


class MaskInbox(Body, frozen=True, kw_only=True):
    """`cm/{device}`: what each neighbour sealed to the device, in their order; empty for one that dropped out."""

    TYPE: ClassVar[str] = "mi"
    order_id: Nonce
    pieces: MaskPieces


class MaskQuestion(Body, frozen=True, kw_only=True):
    """`cm/{device}`: which neighbours' masked updates came (bitmap, lowest bit first). Asked once."""

    TYPE: ClassVar[str] = "mq"
    order_id: Nonce
    delivered: Annotated[bytes, Meta(min_length=1, max_length=32)]


class MaskOpened(Body, frozen=True, kw_only=True):
    """`jn/{device}`, sealed: for each neighbour one share: of its own mask's seed if its update came, else of its
    mask key's."""

    TYPE: ClassVar[str] = "mo"
    order_id: Nonce
    pieces: MaskPieces


BODIES: dict[str, type[Body]] = {
    body.TYPE: body
    for body in (
        Birth,
        Telemetry,
        InferenceReport,
        Invitation,
        Order,
        Join,
        Update,
        Evaluation,
        Receipt,
        Announcement,
        Need,
        MaskKeys,
        MaskRoster,
        MaskShares,
        MaskInbox,
        MaskQuestion,
        MaskOpened,
    )
}

B = TypeVar("B", bound=Body)


def encode_body(body: Body) -> bytes:
    """Canonical CBOR of a body: one byte string per meaning.

    Raises:
        MessageError: (us) a value that `decode_body` would refuse.
    """
    plain = msgspec.to_builtins(body, builtin_types=(bytes,))
    _convert(plain, type(body))
    return encode_canonical(plain)


def decode_body(data: bytes, kind: type[B], *, limit_bytes: int = MAX_BODY_BYTES) -> B:
    """Reads one body.

    Raises:
        MessageError: (peer) not canonical CBOR, an unknown or missing key, a wrong type, a value out of
        bounds.
    """
    return _convert(decode_canonical(data, limit_bytes=limit_bytes), kind)


def _convert(plain: Any, kind: type[B]) -> B:
    try:
        # Named as built in, bytes stay bytes: by default msgspec would read text as base64.
        body = msgspec.convert(plain, type=kind, strict=True, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise MessageError(f"body is not a valid {kind.__name__}: {error}") from error
    _refuse_non_finite(plain)
    return body


def _refuse_non_finite(value: Any) -> None:
    """NaN passes every `ge`/`le` bound of msgspec, so it is refused here, wherever it stands."""
    if isinstance(value, float) and not math.isfinite(value):
        raise MessageError("body holds a number that is not finite")
    if isinstance(value, dict):
        for item in value.values():
            _refuse_non_finite(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_non_finite(item)
