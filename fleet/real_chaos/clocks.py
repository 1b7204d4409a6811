"""Clocks that are wrong: agents that start in 1970, in 2040, an hour behind or ahead.

Laws of the file: the clock is wrong for the whole process (libfaketime), TLS included, and its monotonic clock runs as
ever; an agent answers windows all the same, though it may reach nobody; what it owes drains once its clock is right.
Nothing is promised while a clock is wrong but that. What an aggregator that is ahead has signed moves its devices'
floor of time, so that they wait until that hour is past: that is played on virtual time (`cloud.clock`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

from fleet.launch import Launch
from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.real_fleet import RealAgent, RealFleet
from fleet.real_chaos.scenario import Scenario, Task
from fleet.real_chaos.waves import Fault, play_waves

PROGRAM: Final = "faketime"
WRONG: Final = {
    "1970": "@1970-02-01 00:00:00",
    "2040": "@2040-02-01 00:00:00",
    "an hour behind": "-1h",
    "an hour ahead": "+1h",
}
"""What faketime(1) is told: `@` begins there and goes on."""
_HOLD_SECONDS: Final = (2.0, 6.0)
_MONOTONIC: Final = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}


def at(launch: Launch, clock: str) -> Launch:
    """The same program with another clock.

    Args:
        clock: a key of `WRONG`.
    """
    return replace(
        launch,
        prefix=(PROGRAM, "-f", WRONG[clock], *launch.prefix),
        environment={**launch.environment, **_MONOTONIC},
    )


def clock_faults(fleet: RealFleet) -> list[Fault]:
    """Each agent: started with a wrong clock, and again with the right one."""
    return [
        Fault(
            f"agent in {clock}" if clock.isdecimal() else f"agent {clock}",
            agent.device,
            partial(_restart, fleet, agent, clock),
            partial(_restart, fleet, agent, ""),
            _HOLD_SECONDS,
            agent.device,
        )
        for agent in fleet.agents.values()
        for clock in WRONG
    ]


def _restart(fleet: RealFleet, agent: RealAgent, clock: str) -> None:
    agent.kill()
    agent.start(launch=at(agent.launch, clock) if clock else None)
    # Whatever its clock says: it answers.
    fleet.wait(lambda: agent.is_up, f"an answer of {agent.device} with its clock {clock or 'right'}")


def _play(task: Task) -> Outcome:
    return play_waves("clocks", task, clock_faults, RealFleet(task))


SCENARIOS = (Scenario("clocks", "agents start in 1970, in 2040, an hour off", _play, needs=(PROGRAM,)),)
