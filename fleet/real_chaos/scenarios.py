"""All scenarios, in the order of the table.

Law of the file: a list; a scenario is added here and in no other place.
"""

from __future__ import annotations

from fleet.real_chaos import cutting, killing, mixing
from fleet.real_chaos.scenario import Scenario

SCENARIOS: dict[str, Scenario] = {
    each.name: each for each in (*killing.SCENARIOS, *cutting.SCENARIOS, *mixing.SCENARIOS)
}
