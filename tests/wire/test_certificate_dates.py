"""A certificate's two times, against the library that reads whole certificates."""

from __future__ import annotations

import ssl
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from wire.certificate_dates import validity_of
from wire.errors import TrustError
from wire.primitives import certificate_validity

ROOT = Path(__file__).resolve().parents[2]
NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a device")])


def certificate(begin: datetime, end: datetime, *, curve: bool = False) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1()) if curve else ed25519.Ed25519PrivateKey.generate()
    builder = x509.CertificateBuilder(NAME, NAME, key.public_key(), 2**100 + 1, begin, end)
    return builder.sign(key, SHA256() if curve else None).public_bytes(Encoding.PEM)


PEM = certificate(datetime(2026, 11, 21, 23, 59, 58, tzinfo=UTC), datetime(2026, 11, 28, tzinfo=UTC))
DER = ssl.PEM_cert_to_DER_cert(PEM.decode())


@pytest.mark.parametrize("curve", [False, True])
@pytest.mark.parametrize(
    ("begin", "end"),
    [((1970, 1, 2), (1999, 12, 31)), ((2024, 2, 29, 1, 2, 3), (2049, 12, 31)), ((2049, 1, 1), (2050, 1, 1)),
     ((2051, 1, 1), (9999, 12, 31, 23, 59, 59))],
)  # fmt: skip
def test_times_are_those_that_the_library_reads(
    begin: tuple[int, int, int], end: tuple[int, int, int], curve: bool
) -> None:
    pem = certificate(datetime(*begin, tzinfo=UTC), datetime(*end, tzinfo=UTC), curve=curve)
    assert validity_of(pem) == certificate_validity(pem)
    assert validity_of(b"\n" + pem + b"\n") == certificate_validity(pem)


def test_of_several_certificates_the_first_is_read() -> None:
    other = certificate(datetime(2030, 1, 1, tzinfo=UTC), datetime(2031, 1, 1, tzinfo=UTC))
    assert validity_of(PEM + other) == certificate_validity(PEM)


@pytest.mark.parametrize("pem", [b"", b"\xff", b"no certificate", PEM[:-40], PEM.replace(b"BEGIN", b"START")])
def test_what_is_no_certificate_is_refused(pem: bytes) -> None:
    with pytest.raises(TrustError):
        validity_of(pem)


@given(st.integers(0, len(DER) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_any_bytes_give_two_times_or_our_own_error(at: int, put: bytes, cut: int) -> None:
    changed = ssl.DER_cert_to_PEM_cert(DER[:at] + put + DER[at + cut :]).encode()
    try:
        begins, ends = validity_of(changed)
    except TrustError:
        return
    assert -2e12 < begins < 3e11
    assert -2e12 < ends < 3e11


def test_no_x509_code_is_loaded() -> None:
    program = (
        "import sys; from wire.certificate_dates import validity_of; validity_of(sys.stdin.buffer.read());"
        "print('cryptography.x509' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, input=PEM, capture_output=True, check=True
    )
    assert done.stdout.strip() == b"False"
