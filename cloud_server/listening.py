"""Whether the ports of the settings can be had, asked before anything is started.

Law of the file: a port that two options name, or that another program has, is one error that names the option; nothing
is left open.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

from cloud_server.settings import CloudSettings
from process.metrics_port import parse_listen
from wire.errors import ConfigurationError, TransportError


def check_ports(settings: CloudSettings) -> None:
    """Tries every fixed port that the service will listen on.

    Raises:
        ConfigurationError: (operator) two options name one port, or an address is none.
        TransportError: (operator) another program has it, or the host is not ours.
    """
    taken: dict[tuple[str, int], str] = {}
    for option, host, port in _wanted(settings):
        if port == 0:
            continue
        if other := taken.get((host, port)):
            raise ConfigurationError(
                f"{option} and {other} both name port {port} of {host}", hint="give one of them another port"
            )
        taken[host, port] = option
        _try(option, host, port)


def _wanted(settings: CloudSettings) -> Iterator[tuple[str, str, int]]:
    listen, broker = settings.listen, settings.broker
    yield "listen.public_port", listen.host, listen.public_port
    yield "listen.device_port", listen.host, listen.device_port
    if broker.kind != "external":
        yield "broker.port", broker.host, broker.port
    for option, text in (
        ("metrics.listen", settings.metrics.listen),
        ("operators.listen", settings.operators.listen),
    ):
        if text:
            yield option, *parse_listen(text)


def _try(option: str, host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, after a restart
            probe.bind((host, port))
    except OSError as error:
        raise TransportError(
            f"{option}: cannot listen on {host}:{port}: {error.strerror or error}",
            hint="another program has the port, or the host is not ours: change the option, or stop the program",
        ) from error
