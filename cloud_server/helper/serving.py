"""`shoal-cloud helper run`: the helper answers until a signal ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from cloud_server.helper.folder import HelperFolder
from cloud_server.helper.front import helper_app
from cloud_server.https import HttpsServer, tls_context
from process.clock import Clock
from process.logs import get_logger
from process.service_manager import ServiceManager

_log = get_logger("cloud.helper")

_LOOK_SECONDS = 3600.0


def serve(
    folder: HelperFolder,
    clock: Clock,
    *,
    stop: threading.Event | None = None,
    on_ready: Callable[[int], None] = lambda port: None,
    manager: ServiceManager | None = None,
) -> int:
    """Serves until `stop` is set, or until SIGTERM or SIGINT where none is given.

    Args:
        on_ready: called once with the port, when it answers.
        manager: is told so, too, and when it stops; None for nobody.

    Raises:
        ConfigurationError: (operator) a file of the folder cannot be used, or another helper runs on it.
        TransportError: (operator) the port cannot be had.
        StorageError: (disk) the database cannot be used.
    """
    ended, told = stop or threading.Event(), manager or ServiceManager()
    if stop is None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
    settings = folder.settings()
    with folder.lock().at_once(f"a helper is running on {folder.root} already"):
        store = folder.open_store()
        try:
            helper = folder.open_helper(store, settings, clock)
            certificate, key = folder.server_files(settings, now=clock.now())
            server = HttpsServer(tls_context(certificate, key), host=settings.host, port=settings.port)
            try:
                server.start(helper_app(helper, folder.token_sha256(), clock))
                facts = {"port": server.port, "devices": len(store.roster()), "least": settings.min_devices}
                _log.info("helper_ready", **facts)
                on_ready(server.port)
                told.ready()
                while not ended.wait(_LOOK_SECONDS):
                    server.use(tls_context(*folder.server_files(settings, now=clock.now())))
            finally:
                told.stopping()
                server.stop()
        finally:
            store.close()
    _log.info("helper_stopped")
    return 0
