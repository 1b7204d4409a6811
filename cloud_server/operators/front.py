"""The port of the operators' interface: HTTPS with the aggregator's own certificate, on loopback unless the operator
names another address.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cloud_server.deployment import Deployment
from cloud_server.https import HttpsServer, tls_context
from cloud_server.operators.api import operator_app
from process.health import Finding
from process.metrics_port import parse_listen
from process.pulse import Pulse
from wire.errors import ConfigurationError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class OperatorsFront:
    """The open port, until `stop`. A context manager.

    Args:
        listen: `host:port`; port 0 takes a free one, `port` tells which.
        pulse, findings: whether the service lives, and what its checks found; for `/healthz` and `/readyz`.

    Raises:
        ConfigurationError: (operator) not an address.
        TransportError: (operator) it cannot be listened on.
    """

    def __init__(
        self,
        deployment: Deployment,
        listen: str,
        *,
        pulse: Pulse | None = None,
        findings: Callable[[], Sequence[Finding]] = tuple,
    ) -> None:
        try:
            host, port = parse_listen(listen)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"operators.listen: {listen!r} is no address", hint='write it as "127.0.0.1:8445"'
            ) from error
        self._deployment = deployment
        self._authorities = deployment.authorities
        certificate, key = deployment.server_files()
        self._server = HttpsServer(tls_context(certificate, key), host=host, port=port)
        self.port = self._server.port
        settings = deployment.settings.listen
        hosts = {name.lower() for name in (*_LOOPBACK, host, settings.tls_name, deployment.advertised)}
        self._server.start(operator_app(deployment, hosts, pulse=pulse, findings=findings))

    def follow(self) -> None:
        """Shows a certificate of the authority of now; cheap when nothing changed. Raises as `HttpsFront.follow`."""
        if self._deployment.authorities is not self._authorities:
            self.show_anew()

    def show_anew(self) -> None:
        """Shows a certificate of today from the next connection on; raises as `follow`."""
        present = self._deployment.authorities
        self._server.use(tls_context(*self._deployment.server_files()))
        self._authorities = present

    def begin_stop(self) -> None:
        """See `HttpsServer.begin_stop`."""
        self._server.begin_stop()

    def stop(self) -> None:
        """Ends the requests under way and frees the port. Safe to call twice."""
        self._server.stop()

    def __enter__(self) -> OperatorsFront:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
