"""How many neighbours a device has in a masked round, and how many of their shares give back a secret.

Laws of the file: pure; exact counting, no sampling and no approximation by a normal curve. What is asked of a layout:
a round of which the configured share of the cohort drops out completes but for one in a thousand; the cloud, together
with the configured share of the cohort, learns nothing but for one in 2^40, even if it asks devices different
questions. Source: Bell, Bonawitz, Gascón, Lepoint and Raykova, "Secure single-server aggregation with
(poly)logarithmic overhead" (CCS 2020), where both counts are hypergeometric because the graph is drawn independently
of who drops out or colludes.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import comb, floor
from typing import Final

from wire.errors import QuorumError
from wire.masking import MAX_DEGREE, MAX_MEMBERS, MIN_MEMBERS

FAILURE: Final = Fraction(1, 1000)
"""Largest probability that a round with as many drop-outs as configured cannot be unmasked."""
LEAK: Final = Fraction(1, 2**40)
"""Largest probability that a device's neighbourhood protects it from nobody."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A masked round's graph: `degree` neighbours for each device, `threshold` shares for a secret."""

    degree: int
    threshold: int


@lru_cache(maxsize=256)
def choose_layout(members: int, dropout: float, colluding: float) -> Layout:
    """The fewest neighbours that do, with the highest threshold that they allow.

    Args:
        members: devices that the round is opened with.
        dropout: share of them that may vanish at any time.
        colluding: share of them that may tell the cloud all they know.

    Raises:
        QuorumError: no layout of so many devices does.
    """
    if not MIN_MEMBERS <= members <= MAX_MEMBERS:
        raise QuorumError(
            f"a masked round has {MIN_MEMBERS} to {MAX_MEMBERS} devices, not {members}", present=members
        )
    lost, bad = floor(dropout * members), floor(colluding * members)
    for degree in (*range(2, min(MAX_DEGREE, members - 2) + 1, 2), members - 1):
        if degree > MAX_DEGREE:
            break
        layout = _layout(members, degree, lost, bad)
        if layout is not None:
            return layout
    raise QuorumError(
        f"no {members} devices can mask their updates when {lost} drop out and {bad} collude",
        hint="lower secure.dropout or secure.colluding, or wait for more devices",
        present=members,
    )


def _layout(members: int, degree: int, lost: int, bad: int) -> Layout | None:
    if _disconnected(members, degree, lost + bad) > LEAK:
        return None
    alive = _fewer_than(members - 1, members - 1 - lost, degree)
    corrupt = _fewer_than(members - 1, bad, degree)
    for threshold in range(degree, degree // 2, -1):
        if (members - lost) * alive[threshold] <= FAILURE:
            # A cloud that lies asks two halves of a neighbourhood two different questions (clause 13.8): honest
            # neighbours tell one share each, those that collude both, and it needs twice the threshold.
            leaks = (members - bad) * (1 - corrupt[2 * threshold - degree])
            return Layout(degree, threshold) if leaks <= LEAK else None
    return None


def _fewer_than(population: int, marked: int, drawn: int) -> list[Fraction]:
    """At place *t*: the probability that fewer than *t* of `drawn` are marked (a hypergeometric distribution)."""
    ways = [comb(marked, count) * comb(population - marked, drawn - count) for count in range(drawn + 1)]
    whole = comb(population, drawn)
    return [Fraction(below, whole) for below in accumulate(ways, initial=0)]


def _disconnected(members: int, degree: int, removed: int) -> Fraction:
    """Bound on the probability that the devices which are left do not all hang together.

    Where everybody knows `degree` / 2 on each side of a ring, that takes a gap of as many neighbours in a row; the
    gap can begin at every place.
    """
    gap = degree // 2
    if degree >= members - 1 or removed < gap:
        return Fraction(0)
    return members * Fraction(comb(members - gap, removed - gap), comb(members, removed))
