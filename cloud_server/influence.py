"""How much one device may count: weights that are capped, means that outliers are cut from, reports that are bounded.

Laws of the file: pure; what a device says of its own weight is a claim, and next to the others' claims none of them
counts for a fleet; one device alone moves no mean of three or more further than the others' own values lie.
Source: DESIGN.md, law 6.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from wire.messages import InferenceReport

WEIGHT_RATIO: Final = 4.0
"""No evaluation weighs more than so many times the median one."""
TRIMMED_SHARE: Final = 0.2
"""Of the weight, cut away on either side."""
VOTE_RATIO: Final = 10.0
"""No device's judged answers count for more than so many times those of the median device that has any."""
WINDOW_SECONDS: Final = 300.0
MAX_REQUESTS_PER_SECOND: Final = 10_000
MAX_VOTES_PER_SECOND: Final = 10
_LEAST_VOTES: Final = 20
_MANY: Final = 3


def capped_weights(weights: Sequence[int], ratio: float = WEIGHT_RATIO) -> list[int]:
    """Weights of which none is more than `ratio` times the median (the lower of two: the louder one may lie)."""
    if not weights:
        return []
    limit = max(1, int(ratio * statistics.median_low(weights)))
    return [min(weight, limit) for weight in weights]


def trimmed_mean(values: Sequence[float], weights: Sequence[int], share: float = TRIMMED_SHARE) -> float:
    """The weighted mean of what is left when `share` of the weight is cut from either end, but at least one device's.

    So the heaviest of the devices can say what it likes: its value is cut away, or lies among those of others. Of one
    or two values, where nobody can tell who is wrong, the weighted mean.

    Args:
        values: finite; at least one.
        weights: from 1 up, one for each value.
    """
    total = sum(weights)
    if len(values) < _MANY:
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total
    # Nobody weighs more than half of all others: then cutting the heaviest away leaves something on either side.
    most = 0.5 * (total - max(weights))
    bounded = [min(float(weight), most) for weight in weights]
    total_bounded = math.fsum(bounded)
    cut = max(share * total_bounded, max(bounded))
    kept, position = 0.0, 0.0
    for value, weight in sorted(zip(values, bounded, strict=True)):
        inside = min(position + weight, total_bounded - cut) - max(position, cut)
        kept += value * max(0.0, inside)
        position += weight
    return kept / (total_bounded - 2.0 * cut)


@dataclass(slots=True)
class _Window:
    """What each device reported since `began`."""

    began: float
    requests: dict[str, int] = field(default_factory=dict)
    votes: dict[str, int] = field(default_factory=dict)


class ReportBounds:
    """Bounds what one device's inference reports add to what is counted of the fleet.

    Judged answers are votes: a device has at most `VOTE_RATIO` times those of the median device of the window before.
    Answers are not compared, since one camera rightly answers a thousand times as often as another. Neither comes
    faster than a device can.
    """

    def __init__(self, now: float) -> None:
        self._window = _Window(now)
        self._most_votes = _per_window(MAX_VOTES_PER_SECOND)

    def counted(self, device: str, report: InferenceReport, now: float) -> InferenceReport:
        """The part of a report that counts; its shares of errors and of right answers stay as they were.

        Args:
            now: of the monotonic clock.
        """
        if now - self._window.began >= WINDOW_SECONDS:
            self._most_votes = _most_votes(list(self._window.votes.values()))
            self._window = _Window(now)
        requests = _room(self._window.requests, device, report.requests, _per_window(MAX_REQUESTS_PER_SECOND))
        votes = _room(self._window.votes, device, report.feedback_total, self._most_votes)
        return msgspec.structs.replace(
            report,
            requests=requests,
            errors=_scaled(report.errors, requests, report.requests),
            feedback_total=votes,
            feedback_correct=_scaled(report.feedback_correct, votes, report.feedback_total),
        )


def _per_window(rate: int) -> int:
    return int(rate * WINDOW_SECONDS)


def _most_votes(votes: Sequence[int]) -> int:
    cast = [count for count in votes if count]
    most = _per_window(MAX_VOTES_PER_SECOND)
    if len(cast) < _MANY:
        return most
    return min(most, max(_LEAST_VOTES, int(VOTE_RATIO * statistics.median_low(cast))))


def _room(spent: dict[str, int], device: str, wanted: int, limit: int) -> int:
    """How much of a count is still within a device's limit; notes it as spent."""
    before = spent.get(device, 0)
    given = max(0, min(wanted, limit - before))
    spent[device] = before + given
    return given


def _scaled(part: int, whole: int, claimed: int) -> int:
    return min(part, claimed) * whole // claimed if claimed else 0
