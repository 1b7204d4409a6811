"""Processes that are killed (SIGKILL) or stopped for a while (SIGSTOP, SIGCONT) at moments that the seed draws.

Laws of the file: who is killed is started again, on what his disk has; a broker whose disk is wiped forgets every
session and every message; a stopped process is longer away than its peers' patience every now and then.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial

from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.real_fleet import RealAgent, RealFleet
from fleet.real_chaos.scenario import Scenario, Task
from fleet.real_chaos.waves import Fault, play_waves
from wire.errors import BrokerError

_DOWN_SECONDS = (0.0, 1.0)
_STOPPED_SECONDS = (0.2, 3.5)
"""Past the keepalive of 2 s, and past the broker's patience of one and a half of it, every now and then."""
BROKER, CLOUD = "broker", "aggregator"


def agent_kills(fleet: RealFleet) -> list[Fault]:
    """Each agent: killed, and started again."""
    return [_kill_of(agent) for agent in fleet.agents.values()]


def agent_stops(fleet: RealFleet) -> list[Fault]:
    """Each agent: stopped for a while."""
    return [
        _stop("agent stop", agent.device, lambda agent=agent: agent.process_id, agent.device)  # type: ignore[misc]
        for agent in fleet.agents.values()
    ]


def broker_kills(fleet: RealFleet) -> list[Fault]:
    """The broker: killed, and started again on what it had written."""
    return [Fault("broker kill", BROKER, fleet.broker.kill, partial(_revive, fleet), _DOWN_SECONDS)]


def broker_wipes(fleet: RealFleet) -> list[Fault]:
    """The broker: killed, its disk wiped, and started again with nothing."""

    def end() -> None:
        for file in (fleet.task.folder / "broker").glob("mosquitto.db*"):
            file.unlink()
        _revive(fleet)

    return [Fault("broker wipe", BROKER, fleet.broker.kill, end, _DOWN_SECONDS)]


def broker_stops(fleet: RealFleet) -> list[Fault]:
    """The broker: stopped for a while."""
    return [_stop("broker stop", BROKER, lambda: fleet.broker.process_id)]


def cloud_kills(fleet: RealFleet) -> list[Fault]:
    """The aggregator: killed, and started again."""
    return [Fault("aggregator kill", CLOUD, fleet.cloud.kill, fleet.cloud.launch, _DOWN_SECONDS)]


def cloud_stops(fleet: RealFleet) -> list[Fault]:
    """The aggregator: stopped for a while."""
    return [_stop("aggregator stop", CLOUD, lambda: fleet.cloud.process_id)]


def _kill_of(agent: RealAgent) -> Fault:
    return Fault("agent kill", agent.device, agent.kill, agent.start, _DOWN_SECONDS, agent.device)


def _stop(name: str, target: str, process_id: Callable[[], int], device: str = "") -> Fault:
    def send(number: signal.Signals) -> None:
        os.kill(process_id(), number)

    begin, end = partial(send, signal.SIGSTOP), partial(send, signal.SIGCONT)
    return Fault(name, target, begin, end, _STOPPED_SECONDS, device)


def _revive(fleet: RealFleet) -> None:
    """On a machine that is busy a broker may need longer than its owner would give it."""
    fleet.wait(lambda: _has_revived(fleet), "the broker")


def _has_revived(fleet: RealFleet) -> bool:
    try:
        fleet.broker.revive()
    except BrokerError:
        return False
    return True


def _play(name: str, faults: Callable[[RealFleet], Sequence[Fault]], task: Task) -> Outcome:
    return play_waves(name, task, faults, RealFleet(task))


_KINDS: tuple[tuple[str, str, Callable[[RealFleet], list[Fault]]], ...] = (
    ("agent_kill", "agents get kill -9 and start again", agent_kills),
    ("agent_stop", "agents stand still for up to four seconds (SIGSTOP)", agent_stops),
    ("broker_kill", "the broker gets kill -9 and starts again", broker_kills),
    ("broker_wipe", "the broker gets kill -9, its disk is wiped, and it starts with nothing", broker_wipes),
    ("broker_stop", "the broker stands still for up to four seconds (SIGSTOP)", broker_stops),
    ("cloud_kill", "the aggregator gets kill -9 and starts again", cloud_kills),
    ("cloud_stop", "the aggregator stands still for up to four seconds (SIGSTOP)", cloud_stops),
)

SCENARIOS = tuple(Scenario(name, sentence, partial(_play, name, faults)) for name, sentence, faults in _KINDS)
