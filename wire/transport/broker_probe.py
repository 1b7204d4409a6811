"""One connection to a broker, opened and closed: whether it answers, and the end of somebody's session.

Law of the file: nothing is published and nothing subscribed. Source: MQTT 5.0, clauses 3.1 (CONNECT), 3.2 (CONNACK) and
3.1.4 (a second connection of the same client id ends the first).
"""

from __future__ import annotations

import secrets
import socket
import ssl

from wire.errors import BrokerError
from wire.transport.dial import describe

_MQTT_5_REASON_SUCCESS = 0
_CLEAN_START = 0x02


def probe(
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    handshake_only: bool = False,
    timeout_seconds: float = 5.0,
) -> None:
    """Opens a fresh connection and completes CONNECT and CONNACK: a broker may run and still accept nobody.

    A broker that takes the client id from the certificate disconnects the present owner of that name: give `tls` a
    certificate of its own, or use `handshake_only`, which ends after TCP and TLS.

    Raises:
        BrokerError: no connection, no answer, or a refusal.
    """
    client_id = "" if handshake_only else f"probe-{secrets.token_hex(6)}"
    _visit(host, port, client_id, tls=tls, timeout_seconds=timeout_seconds)


def end_session(
    host: str, port: int, device: str, *, tls: ssl.SSLContext | None, timeout_seconds: float = 5.0
) -> None:
    """Ends a device's session: its connection is cut, its subscriptions and queue are forgotten.

    A broker ends no session by itself when a certificate is revoked. Whoever connects under the same client id, with a
    clean start and no expiry, takes the session over and leaves nothing of it: any broker of MQTT 5 does that. Call it
    after the broker has the new revocation list, or the device is back before it counts.

    Args:
        tls: holds a certificate in the device's name, where the broker takes client ids from certificates.

    Raises:
        BrokerError: no connection, no answer, or a refusal.
    """
    _visit(host, port, device, tls=tls, timeout_seconds=timeout_seconds)


def _visit(
    host: str, port: int, client_id: str, *, tls: ssl.SSLContext | None, timeout_seconds: float
) -> None:
    try:
        with socket.create_connection((host, port), timeout=timeout_seconds) as plain:
            if tls is None:
                _connect_once(plain, client_id)
            else:
                with tls.wrap_socket(plain, server_hostname=host) as secured:
                    _connect_once(secured, client_id)
    except OSError as error:
        raise BrokerError(
            f"the broker at {host} port {port} does not answer: {describe(error)}",
            hint="start it, or check host, port and certificates",
        ) from error


def _connect_once(connected: socket.socket, client_id: str) -> None:
    if not client_id:
        return
    name = client_id.encode()
    # CONNECT, MQTT 5.0 clause 3.1: clean start, keep-alive 10 s, no properties (session expiry 0).
    body = b"\x00\x04MQTT\x05" + bytes([_CLEAN_START]) + b"\x00\x0a\x00" + len(name).to_bytes(2, "big") + name
    connected.sendall(b"\x10" + bytes([len(body)]) + body)
    answer = b""
    while len(answer) < 4:  # CONNACK: type, remaining length, flags, reason
        more = connected.recv(4 - len(answer))
        if not more:
            raise ConnectionResetError("closed before CONNACK")
        answer += more
    if answer[0] != 0x20 or answer[3] != _MQTT_5_REASON_SUCCESS:
        raise ConnectionRefusedError(f"CONNECT was answered by {answer.hex()}")
    connected.sendall(b"\xe0\x00")
