"""Where an agent's metrics are shown: in its status file, and where asked for in a text file and on a port.

Laws of the file: a device without a reader pays for no port and no second file; what cannot be written is left out
without a word, as the status is; at most one reading in `REFRESH_SECONDS`, because a reading asks the database.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_agent.settings import MetricsSettings
from edge_agent.vitals.metrics import EdgeMetrics
from edge_agent.vitals.status import replace_file
from process.clock import Clock
from process.pulse import Pulse
from process.vitals import register_vitals

if TYPE_CHECKING:  # its HTTP server costs a device memory that most never need
    from process.metrics_port import MetricsPort

REFRESH_SECONDS: Final = 15.0


class MetricsBoard:
    """Shows the metrics of one agent.

    Args:
        folder: the state folder; the text file's name counts from there.
        pulse: what the port tells whoever asks whether the agent lives.
    """

    def __init__(
        self, metrics: EdgeMetrics, settings: MetricsSettings, folder: Path, clock: Clock, pulse: Pulse
    ) -> None:
        register_vitals(metrics.registry, clock.now())
        self._registry = metrics.registry
        self._settings = settings
        self._file = folder / settings.file if settings.file else None
        self._clock = clock
        self._pulse = pulse
        self._shown: dict[str, float] = {}
        self._due = 0.0
        self._port: MetricsPort | None = None

    @property
    def port(self) -> int:
        """Where `GET /metrics` answers; 0 for nowhere."""
        return self._port.port if self._port is not None else 0

    def open(self) -> None:
        """Opens the port, where the settings want one.

        Raises:
            ConfigurationError: (operator) not an address.
            TransportError: (operator) the address cannot be listened on.
        """
        if self._settings.listen and self._port is None:
            from process.metrics_port import MetricsPort

            self._port = MetricsPort(self._registry, self._settings.listen, self._pulse)

    def refresh(self, *, now: bool = False) -> dict[str, float]:
        """Every series and its value, not older than `REFRESH_SECONDS` (`now`: read this moment)."""
        moment = self._clock.monotonic()
        if now or moment >= self._due:
            self._due = moment + REFRESH_SECONDS
            self._shown = self._registry.values()
            if self._file is not None:
                # Another user's node_exporter reads it; it says how much, and never what.
                replace_file(self._file, self._registry.render(), mode=0o644)
        return self._shown

    def close(self) -> None:
        """Closes the port. A stopped agent's text file stays away: its numbers would look alive."""
        if self._port is not None:
            self._port.stop()
            self._port = None
        if self._file is not None:
            self._file.unlink(missing_ok=True)
