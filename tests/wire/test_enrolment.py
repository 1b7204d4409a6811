"""Enrolment's bodies and token: round trip, and any text gives a value or our own error."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.enrolment import EnrolmentToken, EnrolRequest, Refusal, decode_json, encode_json, proof_bytes
from wire.errors import EnrolmentError, MessageError

TOKEN = EnrolmentToken(
    url="https://127.0.0.1:8443",
    tls_name="cloud.shoal",
    ca_sha256="ab" * 32,
    token_id="0123456789abcdef",
    secret="A" * 43,
    device="watch-1",
    expires=1_800_000_000,
)
REQUEST = EnrolRequest(token_id="00", secret="s", device="watch-1", csr="pem", update_key="00", proof="00")


def test_token_round_trip_ignores_white_space() -> None:
    assert EnrolmentToken.parse(f"  {TOKEN}\n") == TOKEN


def test_token_has_the_documented_text() -> None:
    body = str(TOKEN).removeprefix("shoal1.")
    assert base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)) == (
        b'{"d":"watch-1","e":1800000000,"i":"0123456789abcdef","n":"cloud.shoal","p":"' + b"ab" * 32 + b'",'
        b'"s":"' + b"A" * 43 + b'","u":"https://127.0.0.1:8443"}'
    )


def test_token_repr_hides_the_secret() -> None:
    assert TOKEN.secret not in repr(TOKEN)


@pytest.mark.parametrize(
    "text", ["", "shoal1.", "shoal2.e30", "shoal1.e30", "shoal1.!!", "shoal1." + "A" * 3000]
)
def test_token_that_is_damaged_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(EnrolmentError) as caught:
        EnrolmentToken.parse(text)
    assert "device add" in caught.value.hint


@given(st.text())
def test_token_of_any_text_is_ours_or_an_error(text: str) -> None:
    with pytest.raises(EnrolmentError):
        EnrolmentToken.parse("shoal1." + text)


def test_body_round_trip() -> None:
    assert decode_json(encode_json(REQUEST), EnrolRequest) == REQUEST


@given(st.binary())
def test_body_of_any_bytes_is_ours_or_an_error(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode_json(data, EnrolRequest)


@pytest.mark.parametrize("change", [{"extra": 1}, {"csr": 5}, {"csr": "x" * 20_000}, {"device": None}])
def test_body_with_a_wrong_field_is_refused(change: dict[str, object]) -> None:
    plain = msgspec.to_builtins(REQUEST) | change
    with pytest.raises(MessageError):
        decode_json(msgspec.json.encode(plain), EnrolRequest)


def test_refusal_of_a_newer_cloud_is_still_read() -> None:
    assert decode_json(b'{"error":"token","message":"x","later":1}', Refusal).error == "token"


def test_proof_bytes_cannot_be_shifted_between_fields() -> None:
    assert proof_bytes("ab", "c", "x") != proof_bytes("a", "bc", "x")
