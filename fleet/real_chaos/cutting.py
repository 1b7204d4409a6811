"""Links that break while processes live: black holes, refusals, resets, flipped bits, 20 kB/s, half a second of delay.

Laws of the file: each of the three links breaks alone: agents to broker, agents to HTTPS, aggregator to broker; a fault
counts when it has touched bytes or a connection. Under TLS (mosquitto) a flipped bit ends its connection; without
(embedded) it goes on into MQTT, and only signatures tell.
"""

from __future__ import annotations

from functools import partial

from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.proxy import MODES, Mode
from fleet.real_chaos.real_fleet import FleetPlan, RealFleet
from fleet.real_chaos.scenario import Scenario, Task
from fleet.real_chaos.waves import Fault, play_waves

_HOLD_SECONDS = (0.3, 3.0)
"""Past the agents' keepalive of 2 s now and then."""
_SENTENCES: dict[Mode, str] = {
    "black_hole": "a link swallows everything, new connections too",
    "refused": "a link cuts its connections and refuses new ones",
    "resets": "a link resets a connection at 5 % of what comes by",
    "bit_flips": "a link flips a bit in 5 % of what comes by",
    "slow": "a link carries 20 kB/s",
    "late": "a link delivers half a second later",
}


def link_faults(fleet: RealFleet, modes: tuple[Mode, ...]) -> list[Fault]:
    """Each of these faults on each link of a fleet that has some."""
    proxy = fleet.proxy
    if proxy is None:
        return []
    return [
        Fault(
            f"{link} {mode}",
            f"link {link}",
            partial(proxy.become, link, mode),
            partial(proxy.become, link, "clear"),
            _HOLD_SECONDS,
            hits=partial(proxy.hits, link),
        )
        for link in proxy.links
        for mode in modes
    ]


def _play(mode: Mode, task: Task) -> Outcome:
    fleet = RealFleet(task, FleetPlan(is_linked=True))
    return play_waves(mode, task, partial(link_faults, modes=(mode,)), fleet)


SCENARIOS = tuple(Scenario(mode, _SENTENCES[mode], partial(_play, mode)) for mode in MODES if mode != "clear")
