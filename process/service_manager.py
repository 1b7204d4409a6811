"""What systemd is told: that we are ready, that we live, that we stop. The protocol of sd_notify(3), by hand.

Laws of the file: without a service manager (`NOTIFY_SOCKET` is not set) nothing is sent; a message that cannot be sent
is dropped, for nothing here may stop or delay a process; the watchdog is fed by whoever calls `alive`, on its own
thread, so a loop that hangs starves it. Source: systemd's sd_notify(3) and sd_watchdog_enabled(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from typing import Final

_USEC: Final = 1e6
_MAX_STATUS_CHARS: Final = 200


class ServiceManager:
    """The notification socket of this process, or nothing.

    Args:
        address: `NOTIFY_SOCKET`: a path, or `@name` in Linux's abstract namespace; empty for none.
        watchdog_seconds: silence after which we are ended; 0 for never.
    """

    def __init__(self, address: str = "", watchdog_seconds: float = 0.0) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog_seconds = watchdog_seconds if address else 0.0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> ServiceManager:
        """As the service manager told this process; variables meant for another process are not ours."""
        watchdog = environment.get("WATCHDOG_USEC", "")
        for_us = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        seconds = int(watchdog) / _USEC if watchdog.isascii() and watchdog.isdigit() and for_us else 0.0
        return cls(environment.get("NOTIFY_SOCKET", ""), seconds)

    def ready(self) -> None:
        """Start-up is over."""
        self._tell("READY=1")

    def alive(self, status: str = "") -> None:
        """Feeds the watchdog; `status` is one line for `systemctl status`."""
        line = "".join(character for character in status if character.isprintable())[:_MAX_STATUS_CHARS]
        self._tell(f"WATCHDOG=1\nSTATUS={line}" if line else "WATCHDOG=1")

    def stopping(self) -> None:
        """The stop has begun."""
        self._tell("STOPPING=1")

    def _tell(self, text: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as plug:
            plug.setblocking(False)
            plug.connect(self._address)
            plug.send(text.encode("utf-8"))
