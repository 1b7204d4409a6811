"""Everything at once: processes killed and stopped while links break, in waves of up to five.

Law of the file: nothing of its own; it draws from what the other files can do.
"""

from __future__ import annotations

from fleet.real_chaos import killing
from fleet.real_chaos.cutting import link_faults
from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.proxy import MODES
from fleet.real_chaos.real_fleet import FleetPlan, RealFleet
from fleet.real_chaos.scenario import Scenario, Task
from fleet.real_chaos.waves import Fault, play_waves

_MOST = 5


def every_fault(fleet: RealFleet) -> list[Fault]:
    """All kinds of kills, stops and broken links."""
    return [
        *killing.agent_kills(fleet),
        *killing.agent_stops(fleet),
        *killing.broker_kills(fleet),
        *killing.broker_wipes(fleet),
        *killing.broker_stops(fleet),
        *killing.cloud_kills(fleet),
        *killing.cloud_stops(fleet),
        *link_faults(fleet, tuple(mode for mode in MODES if mode != "clear")),
    ]


def _play(task: Task) -> Outcome:
    fleet = RealFleet(task, FleetPlan(is_linked=True))
    return play_waves("mixed", task, every_fault, fleet, most=_MOST)


SCENARIOS = (Scenario("mixed", "all of the above, up to five at once", _play, weight=6.0),)
