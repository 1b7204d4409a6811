"""From a failing schedule to the fewest of its faults that still fail.

Law of the file: pure but for the question that it asks; delta debugging (Zeller and Hildebrandt 2002), whose answer is
minimal in the sense that no single fault of it can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fleet.chaos.faults import Fault

MOST_TRIES = 200


def shrink(
    schedule: Sequence[Fault], fails: Callable[[tuple[Fault, ...]], bool], most_tries: int = MOST_TRIES
) -> tuple[Fault, ...]:
    """The faults that are needed.

    Args:
        schedule: that fails.
        fails: whether a part of it does, too.
        most_tries: histories played at most; what is left then is the answer.
    """
    left, parts, tries = tuple(schedule), 2, 0
    while len(left) > 1 and tries < most_tries:
        size = max(1, len(left) // parts)
        for start in range(0, len(left), size):
            rest = left[:start] + left[start + size :]
            tries += 1
            if rest and fails(rest):
                left, parts = rest, max(2, parts - 1)
                break
            if tries >= most_tries:
                return left
        else:
            if size == 1:
                break
            parts = min(len(left), 2 * parts)
    return left
