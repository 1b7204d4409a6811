"""What a device seals: with the content algorithm that its machine is faster with, to a cloud that opens both."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.enrolment.identity import Identity
from edge_agent.store.at_rest import content_algorithm_here
from edge_agent.store.orders import ReplayWindows
from edge_agent.store.sequence import Sequence
from edge_agent.store.storage import open_database
from edge_agent.uplink.speaker import Speaker
from tests.edge.tiny_release import SteppedClock
from wire.cbor import decode_canonical
from wire.cose import read_sign1
from wire.enrolment import OnlineKey
from wire.envelope import Expect, Signer, open_sealed
from wire.primitives import CONTENT_ALGORITHMS, ContentAlgorithm, KemPrivateKey, SigningKey

DEVICE_KEY, ORDER_KEY = (SigningKey.from_bytes(bytes([number]) * 32) for number in (1, 2))
KEM = KemPrivateKey.from_bytes("x25519", bytes([3]) * 32)
EXPECT = Expect("up", "acme", "wrists", "up", "watch-1")


def speaker(folder: Path, content_algorithm: ContentAlgorithm | None) -> Speaker:
    """`watch-1` of acme/wrists, on an empty disk."""
    identity = Identity(
        tenant="acme",
        fleet="wrists",
        device="watch-1",
        url_enrol="https://cloud:1",
        url_api="https://cloud:2",
        tls_name="cloud",
        mqtt_host="cloud",
        mqtt_port=3,
        mqtt_tls=False,
        ca_pem=b"",
        certificate_pem=b"",
        update_key=DEVICE_KEY,
        tuf_root=b"",
        kem=(OnlineKey(id=KEM.key_id.hex(), public=KEM.public_key.public_bytes.hex(), algorithm="x25519"),),
        orders=(OnlineKey(id=ORDER_KEY.key_id.hex(), public=ORDER_KEY.public_bytes.hex()),),
    )
    clock, database = SteppedClock(500.0), open_database(folder)
    windows = ReplayWindows(database)
    return Speaker(
        identity,
        sequence=Sequence(database),
        windows=windows,
        clock=clock,
        content_algorithm=content_algorithm,
    )


def content_number(message: bytes) -> int:
    """COSE's number of the content algorithm that a sealed message names."""
    payload = read_sign1(message[4 : 4 + int.from_bytes(message[:4], "big")], limit_bytes=4096).payload
    protected = decode_canonical(payload, limit_bytes=4096)[1][0]
    return int(decode_canonical(protected, limit_bytes=64)[1])


@pytest.mark.parametrize(("algorithm", "number"), [("A256GCM", 3), ("C20P", 24)])
def test_update_is_sealed_with_the_algorithm_of_the_device_and_opens(
    tmp_path: Path, algorithm: ContentAlgorithm, number: int
) -> None:
    sealed = speaker(tmp_path, algorithm).seal_update("up", b"body", run="", round_number=1, base=b"")
    assert content_number(sealed) == number
    signers = {DEVICE_KEY.key_id: Signer("watch-1", DEVICE_KEY.verify_key)}
    opened = open_sealed(
        sealed, signers=signers, recipients={KEM.key_id: KEM}, expect=EXPECT, now=0.0, limit_bytes=4096
    )
    assert opened.body == b"body"


def test_device_uses_what_its_machine_is_faster_with(tmp_path: Path) -> None:
    sealed = speaker(tmp_path, None).seal_update("up", b"body", run="", round_number=1, base=b"")
    assert content_algorithm_here() in CONTENT_ALGORITHMS
    assert content_number(sealed) == {"A256GCM": 3, "C20P": 24}[content_algorithm_here()]


def test_updates_of_one_size_class_have_one_length(tmp_path: Path) -> None:
    """1,921 to 1,983 bytes and the padding mark make 1,984: who counts bytes on the wire learns no more."""
    device = speaker(tmp_path, None)
    lengths = {
        len(device.seal_update("up", bytes(size), run="", round_number=1, base=b""))
        for size in (1921, 1940, 1960, 1983)
    }
    assert len(lengths) == 1
    longer = device.seal_update("up", bytes(1984), run="", round_number=1, base=b"")
    assert len(longer) == lengths.pop() + 64
