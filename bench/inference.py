"""How long answers take at an open-loop 50 Hz while the agent trains, swaps releases and has no broker, against quiet.

Laws of the file: one agent, one aggregator and one broker as real processes, one run; the phases take turns, in another
order each time, so that a neighbour's load falls on all of them; errors count as infinite.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.one_device import initial_bundle, one_device
from bench.open_loop import AskedAgent
from bench.table import Row
from cloud_server.settings import BrokerSettings, CloudSettings, ListenSettings, RunSettings, TrainSettings
from edge_agent.settings import EdgeSettings, InferenceSettings, ReleaseSettings
from fleet.launch import CLOUD
from fleet.local_cloud import LocalCloud, free_port
from fleet.processes import children
from models.bundle import Bundle
from models.candidate import CandidateMaker
from models.data import smartwatch
from models.data.federation import Federation
from process.options import render_toml
from wire.errors import RoundError

MODEL = "watch_cnn1d"
RATE_HZ = 50.0
CYCLES = 5
QUIET, TRAINING, RELEASE, OUTAGE = "quiet", "training", "release swap", "broker outage"
PHASES = (QUIET, TRAINING, RELEASE, OUTAGE)
_SETTLE_SECONDS = 3.0
_LIMIT_SECONDS = 240.0
_SWAP_SECONDS = 8.0
_TRAIN = TrainSettings(epochs=20, batch_size=16, learning_rate=0.01)
# The aggregator and its broker are on another machine than a device is: here they give way to it.
_ELSEWHERE = replace(CLOUD, prefix=("nice", "-n", "15"))


def measure(requests: int = 10_000) -> list[Row]:
    """Rows for one device of the smartwatch data.

    Args:
        requests: in each kind of phase.
    """
    federation = one_device(smartwatch.federation())
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name, ExitStack() as stack:
        trial = _Trial(Path(name), federation, stack)
        for cycle in range(CYCLES):
            for place in range(len(PHASES)):
                trial.play(PHASES[(place + cycle) % len(PHASES)], cycle, requests / RATE_HZ / CYCLES)
        return trial.rows()


class _Trial:
    """The processes, and what is done to them in each phase."""

    def __init__(self, folder: Path, federation: Federation, stack: ExitStack) -> None:
        device, split = next(iter(federation.devices.items()))
        bundle = initial_bundle(federation, MODEL, folder / "bundle")
        self._cloud = stack.enter_context(
            LocalCloud(folder / "cloud", _settings(), federation, launch=_ELSEWHERE)
        )
        self._cloud.start()
        settings = folder / "agent.toml"
        agent = EdgeSettings(
            inference=InferenceSettings(variant="int8"), release=ReleaseSettings(spread_seconds=0.0)
        )
        settings.write_text(render_toml(agent), encoding="utf-8")
        token = self._cloud.token(device)
        self._agent = AskedAgent(device, folder / "agent", settings, token, split, rate_hz=RATE_HZ)
        stack.callback(self._agent.stop)
        self._cloud.import_model(bundle)
        self._wait(lambda: self._cloud.has_run and self._agent.is_taught and self._agent.is_connected)
        self._versions = (1, self._second_release(bundle))
        self._agent.begin()
        self._rounds = 0
        self._swaps = 0

    def play(self, phase: str, cycle: int, seconds: float) -> None:
        """One phase, with rest before it that nothing counts."""
        time.sleep(_SETTLE_SECONDS)
        self._agent.check()
        acts = {QUIET: self._rest, TRAINING: self._train, RELEASE: self._swap, OUTAGE: self._cut}
        with acts[phase](cycle), self._agent.counted(phase):
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                if phase == RELEASE:
                    self._flip()
                time.sleep(max(0.0, min(_SWAP_SECONDS, until - time.monotonic())))
        self._wait(lambda: self._agent.is_connected)

    def rows(self) -> list[Row]:
        found = []
        quiet = np.array(self._agent.seconds(QUIET))
        base = float(np.quantile(quiet, 0.99, method="higher"))
        for phase in PHASES:
            taken = np.array(self._agent.seconds(phase))
            p50, p99, p999 = (float(np.quantile(taken, q, method="higher")) for q in (0.5, 0.99, 0.999))
            errors = int(np.isinf(taken).sum())
            said = ", ".join(
                f"{name} {value * 1e3:.2f}" for name, value in (("p50", p50), ("p99", p99), ("p99.9", p999))
            )
            note = f"{said} ms of {len(taken)}; {errors} errors"
            more = {TRAINING: f"; {self._rounds} rounds", RELEASE: f"; {self._swaps} swaps"}.get(phase, "")
            is_quiet = phase == QUIET
            value = p99 * 1e3 if is_quiet else (p99 / base if math.isfinite(p99) else math.inf)
            name = "quiet: p99" if is_quiet else f"{phase} / quiet: p99"
            found.append(Row(name, value, "" if is_quiet else "<= 2", "ms" if is_quiet else "x", note + more))
        return found

    # ---- phases ----

    @contextmanager
    def _rest(self, cycle: int) -> Iterator[None]:
        yield

    @contextmanager
    def _train(self, cycle: int) -> Iterator[None]:
        """Rounds follow each other, and the only device is in all of them."""
        before = self._done()
        self._cloud.set_paused(False)
        self._wait(lambda: self._done() > before)
        yield
        self._cloud.set_paused(True)
        self._rounds += self._done() - before
        self._wait(lambda: all(row.state in ("done", "failed") for row in self._cloud.rounds()))

    @contextmanager
    def _swap(self, cycle: int) -> Iterator[None]:
        before = len(self._agent.releases)
        yield
        self._swaps += len(self._agent.releases) - before

    @contextmanager
    def _cut(self, cycle: int) -> Iterator[None]:
        """The broker is killed, or (every other time) stands still and takes what is sent. The aggregator, which would
        start it anew, stands still meanwhile."""
        cloud = self._cloud.process_id
        brokers = children(cloud)
        if not brokers:
            raise RoundError("the aggregator has no broker of its own", hint="install mosquitto")
        os.kill(cloud, signal.SIGSTOP)
        for broker in brokers:
            os.kill(broker, signal.SIGSTOP if cycle % 2 else signal.SIGKILL)
        try:
            yield
        finally:
            for each in (*(brokers if cycle % 2 else ()), cloud):
                os.kill(each, signal.SIGCONT)

    def _flip(self) -> None:
        """The ring goes to the other release, as `shoal-cloud release promote` and `rollback` do."""
        first, second = self._versions
        publisher = self._cloud.deployment.publisher
        if publisher.current_version() == second:
            publisher.rollback(version=first, reason="bench")
        else:
            publisher.publish(second)

    # ---- parts ----

    def _second_release(self, bundle: Bundle) -> int:
        """Parameters a little beside the first ones, quantized as a round's are."""
        start = bundle.checkpoint()
        noise = np.random.default_rng(3).normal(0.0, 1e-3, start.params.size).astype(np.float32)
        candidate = CandidateMaker(bundle).make(start.params + noise, start.buffers)
        publisher = self._cloud.deployment.publisher
        return publisher.propose(candidate, run="bench", round_number=0, metrics={}).version

    def _done(self) -> int:
        return sum(row.state == "done" for row in self._cloud.rounds())

    def _wait(self, is_there: Callable[[], bool]) -> None:
        until = time.monotonic() + _LIMIT_SECONDS
        while not is_there():
            self._cloud.check()
            self._agent.check()
            if time.monotonic() > until:
                raise RoundError("the fleet took too long", hint=f"see {self._agent.log_file}")
            time.sleep(0.1)


def _settings() -> CloudSettings:
    return CloudSettings(
        tenant="shoal",
        fleet="bench",
        listen=ListenSettings(public_port=free_port(), device_port=0),
        broker=BrokerSettings(kind="mosquitto", port=0),
        run=RunSettings(
            name="bench",
            seed=1,
            quorum=1,
            deadline_seconds=60.0,
            evaluate_every=0,
            pause_seconds=0.0,
            paused=True,
        ),
        train=_TRAIN,
    )
