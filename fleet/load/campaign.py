"""One load from its first key to its table: a broker, an aggregator, thousands of light agents, one round, one release.

Laws of the file: the aggregator is `shoal-cloud run` as any operator starts it; what it did is read from its database,
and held against what the agents wrote down; everything has a limit after which the run fails, and says where logs are.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cloud_server.db import releases as release_table
from cloud_server.db import rounds as books
from cloud_server.db.overview import count_present, count_received
from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    GateSettings,
    ListenSettings,
    MetricsSettings,
    PaceSettings,
    RunSettings,
)
from edge_agent.rounds.draws import Draws
from fleet.load.crew import Crew
from fleet.load.crowd import CrowdPlan
from fleet.load.ledger import Verdict, compare, read_lines
from fleet.load.light_agent import Draft, Habits
from fleet.load.open_files import allow_open_files
from fleet.load.report import LoadReport, Phase
from fleet.load.roll import Roll, enrol_fleet
from fleet.load.watch import Watch, broker_of, scrape
from fleet.local_cloud import HOLDOUT, LocalCloud, free_port
from fleet.processes import machine_cpu_seconds
from models.bundle import Bundle
from models.data.federation import Federation
from process.progress import Progress
from wire import codec
from wire.errors import RoundError
from wire.norm import l2_norm

RUN = "load"
MARKER = ".shoal-load"
AGENTS_PER_PROCESS = 2_500
_POLL_SECONDS = 0.5
_START_SECONDS = 120.0
_SETTLE_SECONDS = 2.5
_DRAIN_SECONDS = 30.0
_UPDATE_SCALE = 1e-3
_HEARD = 'shoal_messages_received_total{type="tm"}'
# Few of them really fetch a release. Whose link breaks comes back by itself, and not with the whole fleet: how that
# is spread is what `bench/reconnect.py` measures.
_PACE = PaceSettings(connections_per_second=0.0, downloads_per_second=200.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What a load does.

    Attributes:
        seconds: how long the fleet is only there, and its heartbeats are counted.
        processes: of light agents; 0 for one a core, or more where one would hold too many.
        fetch_every: one of so many devices really fetches and verifies releases; 0 for none.
        cut_every: one of so many loses its connection right after it sent its update; 0 for none.
        dials: connections that each process opens at a time.
        limit_seconds: after which a phase has failed.
    """

    devices: int
    seconds: float = 60.0
    processes: int = 0
    is_tls: bool = True
    seed: int = 1
    fetch_every: int = 100
    cut_every: int = 100
    dials: int = 32
    limit_seconds: float = 600.0
    habits: Habits = field(default_factory=Habits)

    @property
    def crowds(self) -> int:
        """How many processes there will be."""
        least = -(-self.devices // AGENTS_PER_PROCESS)
        return min(self.devices, self.processes or max(os.cpu_count() or 1, least))


def run_load(plan: LoadPlan, out: Path, bundle: Bundle, federation: Federation) -> LoadReport:
    """Plays a load; everything that it makes is in `out`, an empty folder.

    Args:
        bundle: the model that the fleet runs.
        federation: gives the operator's held-out data for it.

    Raises:
        ConfigurationError: (operator) too few open files are allowed.
        RoundError: a process ended by itself, or a phase took too long.
    """
    allow_open_files(plan.devices)
    return _Campaign(plan, out, bundle, federation).run()


class _Campaign:
    """One run. Its phases are its methods, in this order."""

    def __init__(self, plan: LoadPlan, out: Path, bundle: Bundle, federation: Federation) -> None:
        self._plan = plan
        self._out = out
        self._bundle = bundle
        self._load = os.getloadavg()[0]
        self._metrics_port = free_port()
        self._settings = load_settings(plan, self._metrics_port)
        self._cloud = LocalCloud(out / "cloud", self._settings, federation)
        self._phases: list[Phase] = []
        self._watch: Watch | None = None

    def run(self) -> LoadReport:
        with self._cloud as cloud:
            cloud.import_model(self._bundle)
            with self._phase("enrolment"):
                roll = self._enrol()
            cloud.start()
            self._until(lambda: cloud.has_run, _START_SECONDS, "the run did not begin")
            with Crew(self._crowds(roll), self._out) as crew:
                roles = {"aggregator": [cloud.process_id], "broker": [broker_of(cloud.process_id)]}
                watch = self._watch = Watch({**roles, "agents": crew.process_ids}, self._metrics_port)
                try:
                    return self._play(crew, watch)
                finally:
                    watch.stop()

    def _play(self, crew: Crew, watch: Watch) -> LoadReport:
        with self._phase("connecting"):
            self._until(lambda: self._online() >= self._plan.devices, self._limit, "not all came", crew)
        with self._phase("first release"):
            self._until(lambda: self._running(1) >= self._plan.devices, self._limit, "not all have it", crew)
        with self._phase("heartbeats"):
            heartbeats = self._heartbeats(crew)
        with self._phase("round"):
            row = self._round(crew)
        with self._phase("release"):
            spread = self._release(row, crew)
        self._drain(crew)
        samples, peaks = scrape(self._metrics_port), watch.peak_mib()
        reconnects = crew.tally().connects - self._plan.devices
        tally = crew.stop()
        by_name = {phase.name: phase for phase in self._phases}
        wall = sum(phase.seconds for phase in self._phases)
        others = sum(phase.cpu_seconds["others"] for phase in self._phases)
        cores = os.cpu_count() or 1
        return LoadReport(
            devices=self._plan.devices,
            processes=self._plan.crowds,
            is_tls=self._plan.is_tls,
            cores=cores,
            load_average=self._load,
            busy_share=others / (wall * cores),
            enrolments_per_second=self._plan.devices / by_name["enrolment"].seconds,
            connects_per_second=self._plan.devices / by_name["connecting"].seconds,
            heartbeats=heartbeats,
            collection_seconds=self._stored()[1] - row.started,
            round_seconds=row.ended - row.started,
            uploads_again=tally.uploads_again,
            books=self._books(),
            folded=int(row.metrics.get("train_devices", 0)),
            spread_seconds=spread,
            fetched=tally.fetched,
            reconnects=reconnects,
            phases=self._phases,
            peak_mib=peaks,
            peak_queues=watch.peaks,
            dropped=int(samples.get("shoal_messages_dropped_total", 0)),
            pauses=int(samples.get("shoal_reading_paused_total", 0)),
            refused={**tally.refused, **_labelled(samples, "shoal_messages_refused_total")},
        )

    # ---- phases ------------------------------------------------------------------------------------------------

    def _enrol(self) -> Roll:
        scheme, port = "mqtts" if self._plan.is_tls else "mqtt", self._settings.broker.port
        with Progress("enrolled", self._plan.devices) as progress:
            return enrol_fleet(
                self._cloud.deployment,
                self._out / "roll",
                self._plan.devices,
                broker_url=f"{scheme}://127.0.0.1:{port}",
                each=progress.advance,
            )

    def _crowds(self, roll: Roll) -> list[CrowdPlan]:
        plan, draft = self._plan, draft_of(self._bundle, self._plan.seed)
        ends = [plan.devices * number // plan.crowds for number in range(plan.crowds + 1)]
        return [
            CrowdPlan(
                roll=str(roll.folder),
                first=first,
                count=end - first,
                ledger=str(self._ledger(number)),
                folder=str(self._out / "fetched"),
                host="127.0.0.1",
                port=self._settings.broker.port,
                is_tls=plan.is_tls,
                draft=draft,
                habits=plan.habits,
                seed=plan.seed,
                dials=plan.dials,
                fetch_every=plan.fetch_every,
                cut_every=plan.cut_every,
            )
            for number, (first, end) in enumerate(itertools.pairwise(ends))
        ]

    def _heartbeats(self, crew: Crew) -> dict[str, float]:
        """Only there; what is sent and heard in that time."""
        sent, heard, began = crew.tally().heartbeats, self._heard(), time.monotonic()
        self._until(
            lambda: time.monotonic() - began >= self._plan.seconds, self._limit, "the time passes", crew
        )
        sent, took = crew.tally().heartbeats - sent, time.monotonic() - began
        # What the agents said a moment ago may be on its way, and what they tell us is up to two seconds old.
        time.sleep(_SETTLE_SECONDS)
        heard = self._heard() - heard
        return {"sent": sent, "heard": min(heard, sent), "per_second": heard / (took + _SETTLE_SECONDS)}

    def _round(self, crew: Crew) -> books.RoundRow:
        self._cloud.set_paused(False)
        with Progress("updates stored", self._plan.devices) as progress:

            def is_over() -> bool:
                progress.advance(self._stored()[0] - progress.done)
                return self._cloud.is_finished

            self._until(is_over, self._limit, "the round did not end", crew)
        (row,) = self._cloud.rounds()[-1:]
        if row.state != "done":
            raise RoundError(f"the round {row.state}: {row.reason}", hint=f"see {self._cloud.log_file}")
        return row

    def _release(self, row: books.RoundRow, crew: Crew) -> float:
        """The round's candidate goes out, by the operator's word where the gate held it back; seconds until the
        aggregator knows of every device that it has it."""
        with self._cloud.deployment.database.read() as connection:
            release = release_table.load_release_of(connection, RUN, row.number)
        if release is None:
            raise RoundError("the round made no candidate", hint=f"see {self._cloud.log_file}")
        began = time.monotonic()
        if release.state != release_table.RELEASED:
            self._cloud.deployment.publisher.publish(release.version)
        self._until(
            lambda: self._running(release.version) >= self._plan.devices, self._limit, "not all have it", crew
        )
        return time.monotonic() - began

    def _drain(self, crew: Crew) -> None:
        """Until every receipt has come, or no more do: what is owed then stands in the books."""
        tally, until = crew.tally(), time.monotonic() + _DRAIN_SECONDS
        while sum(tally.receipts.values()) < tally.made and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            told, tally = tally, crew.tally()
            if tally.receipts != told.receipts:
                until = time.monotonic() + _DRAIN_SECONDS

    def _books(self) -> Verdict:
        """The ledgers, which are closed, against the database."""
        with self._cloud.deployment.database.read() as connection:
            rows = [
                row
                for state in ("stored", "folded", "refused", "late", "discarded")
                for row in books.load_updates(connection, RUN, 1, "train", state)
            ]
        return compare(read_lines(map(self._ledger, range(self._plan.crowds))), rows)

    # ---- what the database says --------------------------------------------------------------------------------

    def _online(self) -> int:
        with self._cloud.deployment.database.read() as connection:
            return count_present(connection)

    def _running(self, version: int) -> int:
        with self._cloud.deployment.database.read() as connection:
            return count_present(connection, version=version)

    def _stored(self) -> tuple[int, float]:
        with self._cloud.deployment.database.read() as connection:
            return count_received(connection, RUN)

    def _heard(self) -> float:
        return scrape(self._metrics_port).get(_HEARD, 0.0)

    # ---- parts -------------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> float:
        return self._plan.limit_seconds

    def _ledger(self, number: int) -> Path:
        return self._out / f"ledger-{number}.jsonl"

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began, costs, machine = time.monotonic(), self._costs(), machine_cpu_seconds()
        yield
        used = {role: value - costs.get(role, 0.0) for role, value in self._costs().items()}
        others = machine_cpu_seconds() - machine - sum(used.values())
        self._phases.append(
            Phase(
                name=name,
                seconds=time.monotonic() - began,
                cpu_seconds={**used, "others": max(0.0, others)},
            )
        )

    def _costs(self) -> dict[str, float]:
        """CPU time so far: this process enrols, and asks how far the rest is."""
        watched = self._watch.cpu_seconds() if self._watch is not None else {}
        return {**watched, "campaign": time.process_time()}

    def _until(
        self, is_so: Callable[[], bool], seconds: float, otherwise: str, crew: Crew | None = None
    ) -> None:
        """Waits for a state.

        Raises:
            RoundError: it did not come, or a process ended.
        """
        until = time.monotonic() + seconds
        while not is_so():
            self._cloud.check()
            if crew is not None:
                crew.check()
            if time.monotonic() > until:
                raise RoundError(f"{otherwise} within {seconds:.0f} s", hint=f"see the logs in {self._out}")
            time.sleep(_POLL_SECONDS)


def load_settings(plan: LoadPlan, metrics_port: int) -> CloudSettings:
    return CloudSettings(
        tenant="shoal",
        fleet="load",
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="mosquitto", port=free_port(), tls=plan.is_tls),
        metrics=MetricsSettings(listen=f"127.0.0.1:{metrics_port}"),
        pace=_PACE,
        run=RunSettings(
            name=RUN,
            seed=plan.seed,
            rounds=1,
            # Everybody's receipt is wanted: whose link broke is waited for, which nobody is above the quorum.
            quorum=plan.devices,
            deadline_seconds=plan.limit_seconds,
            # A light agent has no model to judge one with.
            parameters={"fraction_evaluate": 0.0},
            paused=True,
        ),
        gate=GateSettings(max_operator_drop=1.0, holdout=HOLDOUT),
    )


def draft_of(bundle: Bundle, seed: int) -> Draft:
    """What every light agent answers: a small step in some direction, coded as devices code theirs."""
    manifest, kind = bundle.manifest, CloudSettings().train.codec
    rng = np.random.default_rng(seed)
    step = (_UPDATE_SCALE * rng.standard_normal(manifest.params_size)).astype(np.float32)
    return Draft(
        codec=kind,
        params_size=manifest.params_size,
        payload=codec.encode(step, kind, Draws(seed)),
        buffers=np.ascontiguousarray(bundle.checkpoint().buffers, "<f2").tobytes(),
        num_examples=16,
        metrics={"loss_first": 1.0, "loss_last": 0.9, "update_norm": l2_norm(step)},
    )


def _labelled(samples: Mapping[str, float], name: str) -> dict[str, int]:
    """The values of a metric that are not 0, by label."""
    found = {key: value for key, value in samples.items() if key.startswith(f"{name}{{") and value}
    return {key.split('"')[1]: int(value) for key, value in found.items()}
