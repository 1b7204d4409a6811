"""All scenarios, in the order of the table.

Law of the file: a list; a scenario is added here and in no other place.
"""

from __future__ import annotations

from fleet.real_chaos import (
    clocks,
    cutting,
    damaged_outbox,
    foreign_files,
    killing,
    mixing,
    small_disk,
    syscalls,
)
from fleet.real_chaos.scenario import Scenario

SCENARIOS: dict[str, Scenario] = {
    each.name: each
    for kinds in (killing, cutting, mixing, clocks, syscalls, damaged_outbox, foreign_files, small_disk)
    for each in kinds.SCENARIOS
}
