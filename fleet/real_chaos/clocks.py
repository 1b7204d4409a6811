"""Clocks that are wrong: agents that start in 1970, in 2040, an hour behind or ahead.

Laws of the file: the clock is wrong for the whole process and its children, TLS included, and its monotonic clock runs
as ever (a library of three functions that is loaded before all others; libfaketime 0.9.10 cannot leave the monotonic
clock alone: sleeps then end in EINVAL, or never); an agent answers windows all the same, though it may reach nobody;
what it owes drains once its clock is right. Nothing is promised while a clock is wrong but that. What an aggregator
that is ahead has signed moves its devices' floor of time, so that they wait until that hour is past: that is played on
virtual time (`cloud.clock`).
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from fleet.launch import Launch
from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.real_fleet import RealAgent, RealFleet
from fleet.real_chaos.scenario import Scenario, Task
from fleet.real_chaos.waves import Fault, play_waves
from wire.errors import ConfigurationError

COMPILER: Final = "cc"
SHIFT: Final = "WRONG_CLOCK_SECONDS"
WRONG: Final[dict[str, float | datetime]] = {
    "1970": datetime(1970, 2, 1, tzinfo=UTC),
    "2040": datetime(2040, 2, 1, tzinfo=UTC),
    "an hour behind": -3600.0,
    "an hour ahead": 3600.0,
}
_HOLD_SECONDS: Final = (2.0, 6.0)
_LIBRARY: Final = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long shift;

__attribute__((constructor)) static void begin(void)
{
    const char *seconds = getenv("WRONG_CLOCK_SECONDS");
    shift = seconds ? atol(seconds) : 0;
}

int clock_gettime(clockid_t id, struct timespec *now)
{
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += shift;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec precise;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &precise))
        return -1;
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *seconds)
{
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now))
        return -1;
    if (seconds)
        *seconds = now.tv_sec;
    return now.tv_sec;
}
"""


def build(folder: Path) -> Path:
    """Makes the library.

    Raises:
        ConfigurationError: (operator) the compiler refuses.
    """
    source, library = folder / "wrong_clock.c", folder / "wrong_clock.so"
    source.write_text(_LIBRARY)
    command = (COMPILER, "-shared", "-fPIC", "-O2", "-o", str(library), str(source))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigurationError(f"{COMPILER} cannot make {library.name}: {done.stderr.strip()}")
    return library


def at(launch: Launch, clock: str, library: Path) -> Launch:
    """The same program with another clock.

    Args:
        clock: a key of `WRONG`.
        library: from `build`.
    """
    wrong = WRONG[clock]
    shift = wrong.timestamp() - time.time() if isinstance(wrong, datetime) else wrong
    environment = {**launch.environment, "LD_PRELOAD": str(library), SHIFT: f"{shift:.0f}"}
    return replace(launch, environment=environment)


def clock_faults(fleet: RealFleet) -> list[Fault]:
    """Each agent: started with a wrong clock, and again with the right one."""
    library = build(fleet.task.folder)
    return [
        Fault(
            f"agent in {clock}" if clock.isdecimal() else f"agent {clock}",
            agent.device,
            partial(_restart, fleet, agent, at(agent.launch, clock, library)),
            partial(_restart, fleet, agent, agent.launch),
            _HOLD_SECONDS,
            agent.device,
        )
        for agent in fleet.agents.values()
        for clock in WRONG
    ]


def _restart(fleet: RealFleet, agent: RealAgent, launch: Launch) -> None:
    agent.kill()
    agent.start(launch=launch)
    # Whatever its clock says: it answers.
    fleet.wait(lambda: agent.is_up, f"an answer of {agent.device} with a clock that was set")


def _play(task: Task) -> Outcome:
    return play_waves("clocks", task, clock_faults, RealFleet(task))


SCENARIOS = (Scenario("clocks", "agents start in 1970, in 2040, an hour off", _play, needs=(COMPILER,)),)
