"""One life of an aggregator: the real one on a real database and a real folder of artefacts, over a link.

Laws of the file: as `fleet/chaos/cloud.py`: nothing of the aggregator is replaced but its transport and its clock; a
storage error ends it, as it ends the service, and whoever supervises starts it again.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import msgspec
import numpy as np

from cloud_server.artefacts import Artefacts
from cloud_server.assembly import RunConfig, assemble, make_run_parts, open_base
from cloud_server.db.engine import open_database
from cloud_server.keys import CloudKeys
from cloud_server.release.gate import GatePolicy
from cloud_server.release.releaser import Holdout
from cloud_server.rounds.state import RoundPolicy
from cloud_server.secure.opening import make_runner
from fleet.chaos.template import KEYS_SEED, make_split
from fleet.real_chaos.link import Begin, Heard, Leave, LinkTransport, NodeEnd, Rest, Turn
from fleet.simulated_device import FLEET, TENANT
from fleet.virtual import VirtualTime
from models.bundle import Bundle
from wire.messages import TrainConfig
from wire.transport import TransportEvent

DATABASE_NAME = "cloud.db"
ARTEFACTS_NAME = "artefacts"
RUN = "chaos"


class CloudFacts(msgspec.Struct, frozen=True):
    """What an aggregator's life is told beside its folder."""

    bundle: str
    seed: int
    rounds: int
    devices: int


def run_config(rounds: int, quorum: int) -> RunConfig:
    """So many rounds of all devices by a strategy with a state of its own, each head judged and released."""
    return RunConfig(
        run=RUN,
        strategy="FedAvgM",
        strategy_parameters={"server_momentum": 0.5},
        policy=RoundPolicy(
            quorum=quorum,
            rounds=rounds,
            round_seconds=120.0,
            evaluate_seconds=60.0,
            resend_seconds=5.0,
            evaluate_every=1,
            backoff_max_seconds=30.0,
        ),
        train=TrainConfig(epochs=10, batch_size=8, learning_rate=0.3),
        gate=GatePolicy(max_operator_drop=1.0),
    )


def holdout_of(seed: int) -> Holdout:
    """The operator's own data."""
    operator = make_split(seed, "operator")
    return Holdout(np.asarray(operator.val_x), np.asarray(operator.val_y))


def live_cloud(begin: Begin, end: NodeEnd) -> None:
    """Opens the folder, goes on with the run and does what the world asks for, until it asks to leave.

    Raises:
        ShoalError: it cannot start or go on, as the service would end.
    """
    facts, folder = msgspec.convert(begin.facts, CloudFacts), Path(begin.folder)
    time, transport = VirtualTime(), LinkTransport(end)
    time.advance_to(begin.now)
    database = open_database(f"sqlite:///{folder / DATABASE_NAME}")
    artefacts = Artefacts.in_folder(folder / ARTEFACTS_NAME)
    base = open_base(database, artefacts, CloudKeys.from_seed(KEYS_SEED), time, tenant=TENANT, fleet=FLEET)
    bundle = Bundle.open(Path(facts.bundle))
    cloud = assemble(base, transport, tenant=TENANT, fleet=FLEET)
    config = run_config(facts.rounds, facts.devices)
    plan, ports = make_run_parts(base, cloud, bundle, config, holdout_of(facts.seed))
    runner = make_runner(plan, ports, config.masking, registry=base.registry, downlink=cloud.downlink)
    runner.resume(bundle.checkpoint(), facts.seed)
    cloud.aggregator.begin(runner)
    heard: deque[TransportEvent] = deque()
    cloud.aggregator.start(heard.append)

    def turn() -> None:
        while heard:
            cloud.aggregator.handle(heard.popleft())
        wake = cloud.aggregator.tick()
        end.send(Rest(wake, {"is_finished": runner.is_finished, "head": runner.head.sha256.hex()}))

    turn()
    while (frame := end.receive()) is not None:
        match frame:
            case Heard():
                transport.take(frame.event())
            case Turn(now):
                time.advance_to(now)
                turn()
            case Leave():
                cloud.aggregator.stop()
                database.close()
                return
            case _:
                return
