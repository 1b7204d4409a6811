"""Every decoder of `wire/`, with good inputs to start from and the law that whatever it lets through must keep.

The one law of all: any bytes give a value or a `ShoalError`. `LawError` means that a value came out which breaks its
own decoder's promise (canonical bytes, finite numbers, the length that was announced).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import cbor2
import numpy as np
from msgspec.structs import replace

from tests.fuzz.envelopes import Hostile, framed, is_good, opened, signed_head, taken_apart
from tests.fuzz.mutation import mutated_bytes, mutated_value, respelled
from tests.wire.parties import DEVICE_KEY, up_header
from tests.wire.test_enrolment import REQUEST, TOKEN
from tests.wire.test_helper import ANSWERS, HELPER_FILE, QUESTION_BYTES, TOTAL_BYTES
from tests.wire.test_helper import EXAMPLES as HELPER_EXAMPLES
from tests.wire.test_helper import FLEET as HELPER_FLEET
from tests.wire.test_helper import TENANT as HELPER_TENANT
from tests.wire.test_manifest import MANIFEST, RELEASE
from tests.wire.test_messages import EXAMPLES
from wire.blobs import BlobAssembly, make_ref, needed_chunks
from wire.cbor import LONG_BYTES, decode_canonical, decode_tagged, encode_canonical, encode_tagged
from wire.checkpoint import Checkpoint
from wire.chunks import MAX_TRANSFERS, Reassembly, parse, split
from wire.codec import ErrorFeedback, decode, decode_into, encode
from wire.cose import Encrypt, read_content, read_extensions, read_sign1
from wire.enrolment import (
    EnrolmentToken,
    EnrolRequest,
    EnrolResponse,
    Refusal,
    RenewRequest,
    RenewResponse,
    decode_json,
    encode_json,
)
from wire.envelope import peek
from wire.header import header_bytes, header_from_map
from wire.helper import HelperAnswer, encode_answer, read_answer, read_helper_json
from wire.manifest import Manifest, Release
from wire.messages import CODEC_NAMES, BlobRef, Body, decode_body, encode_body
from wire.onnx_file import MAX_NODES, check_onnx
from wire.patch import apply_patch, make_patch
from wire.primitives import KEM_ALGORITHMS, sha256
from wire.replay import Window
from wire.topics import Topics

LIMIT_BYTES = 2**16
_SLOT_BYTES = 4096
_LONG_BYTES = 140_000
"""Longer than any limit here."""


class LawError(Exception):
    """A decoder let something through that it must refuse."""


def keep(is_kept: bool, law: str) -> None:
    """Raises `LawError` unless the law is kept."""
    if not is_kept:
        raise LawError(law)


@dataclass(frozen=True, slots=True)
class Decoder:
    """One decoder under test.

    Attributes:
        decode: takes any bytes; raises a `ShoalError` or returns, and checks the law of what it returns.
        seeds: inputs that it accepts.
        spelling: how a structure is written (`cbor` or `json`), or empty where there is none.
    """

    name: str
    decode: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    spelling: str = ""

    def hostile(self, random: Random) -> bytes:
        """A damaged input, or one of the good ones."""
        seed = random.choice(self.seeds)
        if random.random() < 0.002:
            return seed.ljust(_LONG_BYTES, seed[-1:])
        if self.spelling and random.random() < 0.6:
            return self._restructured(random, seed)
        return mutated_bytes(random, seed)

    def _restructured(self, random: Random, seed: bytes) -> bytes:
        value = cbor2.loads(seed) if self.spelling == "cbor" else json.loads(seed)
        if self.spelling == "cbor" and random.random() < 0.3:
            return respelled(random, value)
        value = mutated_value(random, value)
        try:
            if self.spelling == "cbor":
                return encode_canonical(value)
            return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        except (TypeError, ValueError, cbor2.CBOREncodeError, OverflowError):
            return mutated_bytes(random, seed)


# --- between the two servers ---


def _helper_answer(data: bytes) -> None:
    said = read_answer(data, question=QUESTION_BYTES, total_bytes=TOTAL_BYTES)
    keep(encode_answer(said) == data, "one meaning, one byte string")
    if isinstance(said, HelperAnswer):
        keep(said.question == sha256(QUESTION_BYTES), "an answer is to this question")
        keep(len(said.total) == TOTAL_BYTES, "a sum has its length")


def _helper_json(data: bytes) -> None:
    key = read_helper_json(data, tenant=HELPER_TENANT, fleet=HELPER_FLEET)
    keep(key.algorithm in KEM_ALGORITHMS, "a helper's key is one that seeds can be sealed to")


# --- CBOR, COSE, header ---


def _cbor(data: bytes) -> None:
    keep(
        encode_canonical(decode_canonical(data, limit_bytes=LIMIT_BYTES)) == data,
        "one meaning, one byte string",
    )


def _tagged(data: bytes) -> None:
    value = decode_tagged(data, 18, limit_bytes=LIMIT_BYTES)
    keep(encode_tagged(18, value) == data, "one meaning, one byte string")


def _sign1(data: bytes) -> None:
    outer = read_sign1(data, limit_bytes=LIMIT_BYTES)
    keep(encode_tagged(18, [outer.protected, {}, outer.payload, outer.signature]) == data, "nothing unread")
    keep(len(outer.signature) == 64, "a signature has 64 bytes")


def _content(data: bytes) -> None:
    content = read_content(data)
    keep(bool(content), "content is not empty")
    if len(content) == 5:
        encrypt = Encrypt.from_cbor(content[1])
        keep(encode_canonical(encrypt.to_cbor()) == encode_canonical(content[1]), "nothing unread")
    extensions = read_extensions(content[-1])
    keep(len(extensions) <= 8 and all(number < 0 for number in extensions), "no critical extension")


def _header(data: bytes) -> None:
    header = header_from_map(decode_canonical(data, limit_bytes=LIMIT_BYTES))
    keep(header_bytes(header) == data, "one header, one byte string")
    keep(not (header.direction == "up" and header.device == "*"), "a device speaks for itself")


def _signed_payload(data: bytes) -> None:
    """The payload of an enrolled device: whatever it signs opens only if it is a good message."""
    base = SEALED_BASE
    message = framed(signed_head(data, base.key), base.ciphertext)
    opened(Hostile("payload", True, base.goes_up, message))
    keep(is_good(decode_canonical(data, limit_bytes=LIMIT_BYTES), base), "only a good message opens")


def _message(data: bytes) -> None:
    """Bytes from a broker that knows one good message: nothing else opens."""
    opened(Hostile("message", False, True, data))
    keep(data == SEALED_BASE.message, "only what was signed opens")


def _peek(data: bytes) -> None:
    header_bytes(peek(data))


# --- bodies ---


def _body(kind: type[Body]) -> Callable[[bytes], None]:
    def decoded(data: bytes) -> None:
        body = decode_body(data, kind, limit_bytes=LIMIT_BYTES)
        again = encode_body(body)
        keep(decode_body(again, kind) == body, "what decodes encodes again")

    return decoded


# --- chunks and blobs ---


def _chunk(data: bytes) -> None:
    chunk = parse(data)
    keep(
        chunk.index < chunk.total <= 4096 and 0 < len(chunk.piece) <= chunk.piece_bytes,
        "a chunk is in bounds",
    )
    before = chunk.index * chunk.piece_bytes
    keep(before + len(chunk.piece) <= chunk.size_bytes, "a piece lies inside its message")


def _reassembly(data: bytes) -> None:
    """Chunks one after the other, each behind its length; what comes out is never more than was granted."""
    reassembly, at = Reassembly(_SLOT_BYTES), 0
    while at + 2 <= len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        try:
            message = reassembly.add(data[at + 2 : end])
        finally:
            keep(reassembly.granted_bytes <= _SLOT_BYTES, "nothing beyond the grant")
            keep(len(reassembly.transfers()) <= MAX_TRANSFERS, "at most two transfers")
        for transfer in reassembly.transfers():
            keep(bool(reassembly.missing(transfer)), "an open transfer lacks something")
        keep(message is None or len(message) <= _SLOT_BYTES, "nothing beyond the grant")
        at = end


def _chunk_sequence(chunks: Sequence[bytes]) -> bytes:
    return b"".join(len(one).to_bytes(2, "big") + one for one in chunks)


def _bitmap(data: bytes) -> None:
    total = data[0] if data else 0
    wanted = needed_chunks(data[1:], total)
    keep(len(set(wanted)) == len(wanted) and all(index < total for index in wanted), "chunks that exist")


_BLOB = bytes(range(256)) * 10
_REF, _BLOB_CHUNKS = make_ref(_BLOB, 1024)


def _blob(data: bytes) -> None:
    """A reference (size, number of chunks), then chunks: each its index, its length and its bytes."""
    size, count = int.from_bytes(data[:2], "big"), min(8, data[2] if len(data) > 2 else 0)
    digests = (*_REF.chunk_sha256, *[bytes(32)] * 5)[:count]
    ref = BlobRef(sha256=_REF.sha256, size_bytes=size, chunk_bytes=1024, chunk_sha256=digests)
    assembly, at = BlobAssembly(ref, limit_bytes=_SLOT_BYTES), 3
    while at + 3 <= len(data):
        end = at + 3 + int.from_bytes(data[at + 1 : at + 3], "big")
        assembly.add(data[at], data[at + 3 : end])
        at = end
    keep(assembly.is_complete == (assembly.missing() == ()), "complete means nothing missing")
    keep(assembly.result() == _BLOB, "only the bytes that the reference names")


def _blob_input(size: int, count: int, indices: tuple[int, ...]) -> bytes:
    chunks = (
        bytes([index]) + len(_BLOB_CHUNKS[index]).to_bytes(2, "big") + _BLOB_CHUNKS[index]
        for index in indices
    )
    return size.to_bytes(2, "big") + bytes([count]) + b"".join(chunks)


# --- updates ---


def _codec(codec: str) -> Callable[[bytes], None]:
    def decoded(data: bytes) -> None:
        vector = decode(data, codec, 600)
        keep(vector.shape == (600,) and vector.dtype == np.float32, "the size that was announced")
        keep(bool(np.isfinite(vector).all()), "finite")
        total = np.zeros(600, np.float64)
        decode_into(total, data, codec, weight=1.0)
        keep(bool((total == vector).all()), "folded as decoded")

    return decoded


def _any_codec(data: bytes) -> None:
    """The codec and the size are what a body says, too."""
    names = (*CODEC_NAMES, "zip")
    size = int.from_bytes(data[1:3], "big")
    vector = decode(data[3:], names[data[0] % len(names)] if data else "", size)
    keep(
        vector.shape == (size,) and bool(np.isfinite(vector).all()), "finite, and the size that was announced"
    )


def _residual(data: bytes) -> None:
    feedback = ErrorFeedback.from_bytes(data, 16)
    keep(feedback.to_bytes() == data and bool(np.isfinite(feedback.residual).all()), "finite, and as stored")


def _codec_seeds(codec: str) -> tuple[bytes, ...]:
    rng = np.random.default_rng(7)
    smooth = (rng.laplace(size=600) * 0.01).astype(np.float32)
    sparse = np.where(np.arange(600) % 37 == 0, smooth, 0).astype(np.float32)
    wide = rng.uniform(-1, 1, 600).astype(np.float32)
    return tuple(encode(vector, codec, rng) for vector in (smooth, sparse, wide))


# --- bundles ---


def _manifest(data: bytes) -> None:
    manifest = Manifest.from_bytes(data)
    keep(manifest.to_bytes() == data, "one manifest, one byte string")
    keep(
        "\n" not in manifest.model and all("\n" not in ref.name for ref in manifest.files), "names are names"
    )


def _without_bias(manifest: Manifest) -> Manifest:
    """The same model with a layer that has neither bias nor fold."""
    (int8,), (float32,) = manifest.int8.layers, manifest.float32.layers
    source = replace(int8.source, bias=None, fold=None)
    int8 = replace(int8, source=source, bias_at=None, bias_scale_at=None)
    return replace(
        manifest,
        int8=replace(manifest.int8, layers=(int8,)),
        float32=replace(manifest.float32, layers=(replace(float32, source=source, bias_at=None),)),
    )


_PLAIN_MANIFEST = _without_bias(MANIFEST)


def _release(data: bytes) -> None:
    release = Release.from_bytes(data)
    keep(release.to_bytes() == data, "one release, one byte string")
    keep("\n" not in release.golden_inputs.name + release.golden_outputs.name, "names are names")
    keep(
        all(len(digest) == 64 for digest in (release.graphs_sha256, release.int8_sha256)),
        "digests are digests",
    )


def _checkpoint(data: bytes) -> None:
    checkpoint = Checkpoint.from_bytes(data, LIMIT_BYTES)
    keep(checkpoint.to_bytes() == data, "one checkpoint, one byte string")
    keep(all(np.isfinite(part).all() for part in (checkpoint.params, checkpoint.ranges)), "finite")


_CHECKPOINT = Checkpoint(
    params=np.arange(19, dtype=np.float32),
    buffers=np.ones(6, np.float32),
    ranges=np.array([[-1, 2]], np.float32),
)


def _patch(data: bytes) -> None:
    new = apply_patch(_CHECKPOINT, data, limit_bytes=LIMIT_BYTES)
    sizes = (new.params.size, new.buffers.size, new.ranges.shape)
    keep(
        sizes == (_CHECKPOINT.params.size, _CHECKPOINT.buffers.size, _CHECKPOINT.ranges.shape),
        "the same model",
    )
    keep(all(bool(np.isfinite(part).all()) for part in (new.params, new.buffers, new.ranges)), "finite")


_NEXT = Checkpoint(
    params=_CHECKPOINT.params * np.float32(0.9), buffers=_CHECKPOINT.buffers, ranges=_CHECKPOINT.ranges
)
_PATCHES = tuple(make_patch(_CHECKPOINT, _NEXT, codec, 5) for codec in ("dithered", "int8", "fp32"))


# --- enrolment, topics, rows ---


def _token(data: bytes) -> None:
    token = EnrolmentToken.parse(data.decode("utf-8", "replace"))
    keep(EnrolmentToken.parse(str(token)) == token, "a token is printed as it is read")
    keep("\n" not in token.device and "/" not in token.device, "a name is a name")


def _json(kind: type[Any]) -> Callable[[bytes], None]:
    def decoded(data: bytes) -> None:
        value = decode_json(data, kind)
        keep(decode_json(encode_json(value), kind) == value, "what decodes encodes again")

    return decoded


_TOPICS = Topics("acme", "wrists")


def _onnx(data: bytes) -> None:
    facts = check_onnx(data, "fuzzed.onnx")
    keep(facts.nodes <= MAX_NODES, "nodes are bounded")
    keep(facts.tensor_bytes <= 8 * len(data), "no tensor is larger than its data")


def _onnx_seeds() -> tuple[bytes, ...]:
    """A tensor in each spelling, and graphs within a graph."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    head = bytes([0x08, 8]) + field(8, bytes([0x10, 20]))
    raw = bytes([0x08, 2, 0x10, 1]) + field(9, bytes(8))
    typed = field(1, bytes([2])) + bytes([0x10, 7]) + field(7, bytes([1, 2]))
    inner = field(5, typed) + field(1, field(4, b"Add") + field(7, b""))
    node = field(4, b"If") + field(5, field(1, b"then") + field(6, inner))
    constant = field(4, b"Constant") + field(5, field(5, raw))
    return (
        head + field(7, field(5, raw) + field(1, node)),
        head + field(7, field(1, constant) + field(5, typed)),
    )


_ONNX = _onnx_seeds()


def _topic(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    topic = _TOPICS.parse(text)
    keep(not {"+", "#", "\n", "\0"} & set(text), "no wildcards and no control characters")
    keep("/" not in topic.device + topic.channel + topic.shard, "one level each")


def _window(data: bytes) -> None:
    row = struct.unpack(">qqq", data[:24].ljust(24, b"\0"))
    keep(Window.from_row(*row).to_row() == row, "a window is stored as it is read")


def _stored_message(name: str) -> bytes:
    """A stored one, because what is in the corpus was made from it and must meet it again in every process."""
    path = Path(__file__).parents[1] / "wire" / "vectors" / "envelope.json"
    (found,) = (vector for vector in json.loads(path.read_text("utf-8")) if vector["name"] == name)
    return bytes.fromhex(found["message"])


SEALED_BASE = taken_apart(_stored_message("x25519_A256GCM_padded_in_records"), DEVICE_KEY, goes_up=True)
_HEAD = SEALED_BASE.message[4 : len(SEALED_BASE.message) - len(SEALED_BASE.ciphertext)]
_PAYLOAD = read_sign1(_HEAD, limit_bytes=LIMIT_BYTES).payload
_ALL_TYPES = encode_canonical([1.5, -1, "x", b"y", None, True, {"k": [0, 2**63]}])
_LONG_STRINGS = encode_canonical(
    [bytes(LONG_BYTES), {1: [b"\xf7" * LONG_BYTES, 2]}, b"short", bytes(LONG_BYTES + 1)]
)
_BLOB_INPUTS = (
    (2560, 3, (0, 1, 2)),
    (2560, 3, (2, 2, 0)),
    (2560, 2, (0,)),
    (2561, 3, (0, 1, 2)),
    (9000, 9, ()),
    (3072, 3, (0, 1, 2)),
)
_CHUNKS = split(bytes(range(256)) * 4, 400)
_ANY_CODEC_SEEDS = tuple(bytes([at, 2, 88]) + _codec_seeds(name)[0] for at, name in enumerate(CODEC_NAMES))
_OTHERS = [split(bytes([number]) * 1500, 400) for number in range(3)]
_SEQUENCES: tuple[list[bytes], ...] = (
    _CHUNKS,
    _CHUNKS[::-1],
    [_CHUNKS[0], *split(bytes(range(256)) * 4, 300), *_CHUNKS],
    [one[0] for one in _OTHERS] + _CHUNKS,
    [*_CHUNKS[:-1], _CHUNKS[-1][:-1] + b"\0"],
    split(bytes(5000), 1024),
)
_LEGAL_TOPICS = (
    "up/0/watch-1/7/3",
    "st/watch-1",
    "rd/now",
    "rd/12",
    "md/stable",
    "bl/" + "ab" * 32 + "/4",
    "nd/watch-1/" + "cd" * 32,
)
_RESPONSE = EnrolResponse(
    tenant="acme", fleet="wrists", device="watch-1", certificate="pem", ca="pem", tuf_root="{}", kem=(), orders=(),
    tls_name="cloud", device_url="https://cloud:2", broker_url="mqtts://cloud:3",
)  # fmt: skip
_BODIES_JSON: tuple[tuple[type[Any], Any], ...] = (
    (EnrolRequest, REQUEST),
    (EnrolResponse, _RESPONSE),
    (RenewRequest, RenewRequest(csr="pem")),
    (RenewResponse, RenewResponse(certificate="pem", ca="pem")),
    (Refusal, Refusal(error="token", message="used")),
)

DECODERS: tuple[Decoder, ...] = (
    Decoder("cbor", _cbor, (_PAYLOAD, _LONG_STRINGS, _ALL_TYPES), "cbor"),
    Decoder("cbor_tagged", _tagged, (_HEAD,)),
    Decoder("sign1", _sign1, (_HEAD,)),
    Decoder("content", _content, (_PAYLOAD,), "cbor"),
    Decoder("header", _header, (header_bytes(up_header()), header_bytes(up_header(part=1, parts=3))), "cbor"),
    Decoder("message", _message, (SEALED_BASE.message,)),
    Decoder("signed_payload", _signed_payload, (encode_canonical(SEALED_BASE.content),), "cbor"),
    Decoder("peek", _peek, (SEALED_BASE.message,)),
    *(Decoder(f"body_{one.TYPE}", _body(type(one)), (encode_body(one),), "cbor") for one in EXAMPLES),
    *(Decoder(f"helper_{one.TYPE}", _body(type(one)), (encode_body(one),), "cbor") for one in HELPER_EXAMPLES),
    Decoder("helper_answer", _helper_answer, tuple(map(encode_answer, ANSWERS))),
    Decoder("helper_json", _helper_json, (HELPER_FILE,), "json"),
    Decoder("chunk", _chunk, (*_CHUNKS, *split(b"one piece"))),
    Decoder("reassembly", _reassembly, tuple(map(_chunk_sequence, _SEQUENCES))),
    Decoder("bitmap", _bitmap, (b"\x09\xff\x01", b"\x03\x05", b"\x00\x00")),
    Decoder("blob", _blob, tuple(_blob_input(*one) for one in _BLOB_INPUTS)),
    *(Decoder(f"codec_{codec}", _codec(codec), _codec_seeds(codec)) for codec in CODEC_NAMES),
    Decoder("codec_any", _any_codec, _ANY_CODEC_SEEDS),
    Decoder("residual", _residual, (np.linspace(-1, 1, 16, dtype=np.float32).tobytes(),)),
    Decoder("manifest", _manifest, (MANIFEST.to_bytes(), _PLAIN_MANIFEST.to_bytes()), "json"),
    Decoder("release", _release, (RELEASE.to_bytes(),), "json"),
    Decoder("checkpoint", _checkpoint, (_CHECKPOINT.to_bytes(),), "cbor"),
    Decoder("patch", _patch, _PATCHES, "cbor"),
    Decoder("token", _token, (str(TOKEN).encode(),)),
    *(Decoder(f"json_{kind.__name__}", _json(kind), (encode_json(value),), "json") for kind, value in _BODIES_JSON),
    Decoder("onnx_file", _onnx, _ONNX),
    Decoder("topic", _topic, tuple(f"{_TOPICS.base}/{levels}".encode() for levels in _LEGAL_TOPICS)),
    Decoder("window", _window, (struct.pack(">qqq", 1, 100, 5), struct.pack(">qqq", 0, -1, 0))),
)  # fmt: skip
