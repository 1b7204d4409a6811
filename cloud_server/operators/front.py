"""The port of the operators' interface: HTTPS with the aggregator's own certificate, on loopback unless the operator
names another address.
"""

from __future__ import annotations

from cloud_server.deployment import Deployment
from cloud_server.https import HttpsServer, tls_context
from cloud_server.operators.api import operator_app
from process.metrics_port import parse_listen
from wire.errors import ConfigurationError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class OperatorsFront:
    """The open port, until `stop`. A context manager.

    Args:
        listen: `host:port`; port 0 takes a free one, `port` tells which.

    Raises:
        ConfigurationError: (operator) not an address.
        TransportError: (operator) it cannot be listened on.
    """

    def __init__(self, deployment: Deployment, listen: str) -> None:
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
        self._server.start(operator_app(deployment, hosts))

    def follow(self) -> None:
        """Shows a certificate of the authority of now; cheap when nothing changed. Raises as `HttpsFront.follow`."""
        present = self._deployment.authorities
        if present is not self._authorities:
            self._server.use(tls_context(*self._deployment.server_files()))
            self._authorities = present

    def stop(self) -> None:
        """Ends the requests under way and frees the port. Safe to call twice."""
        self._server.stop()

    def __enter__(self) -> OperatorsFront:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
