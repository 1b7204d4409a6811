"""What rounds have cost together: epsilon of Poisson-sampled Gaussian mechanisms; the one door to dp-accounting.

Laws of the file: pure; every number is an upper bound; rounds with different noise or sampling compose as they are, in
any order. Privacy loss distributions (Koskela, Jälkö, Honkela 2020; Doroshenko et al. 2022), rounded up, of the
continuous Gaussian. The discrete one that is drawn costs no more: rounding continuous noise to integers is
post-processing, and for σ = 2²⁴ the two are within a total variation of √P · 10⁻¹⁶, which over T rounds adds less than
T (1 + exp(epsilon)) √P · 10⁻¹⁶ to delta.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from wire.errors import ConfigurationError, MissingExtraError

MAX_NOISE_MULTIPLIER = 1000.0
# Rényi's bound (Mironov, Talwar, Zhang 2019) costs nothing; above this it is the answer, because a privacy loss
# distribution takes memory in proportion to epsilon, and so much promises nothing anyway.
_LARGE_EPSILON = 50.0
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
_COARSEST, _FINEST = 1e-3, 1e-5


@dataclass(frozen=True, slots=True)
class Mechanism:
    """One round: noise of so many clipping norms on the sum of a cohort drawn with this rate.

    Attributes:
        is_coarse: the noise is on a lattice too coarse to pass for a continuous one. Rényi's bound is the same for both
            (Canonne et al. 2020, theorem 4), and is the only one that is used then.
    """

    noise_multiplier: float
    sampling_rate: float
    is_coarse: bool = False


def epsilon_of(rounds: Iterable[tuple[Mechanism, int]], delta: float) -> float:
    """What rounds have spent together.

    Args:
        rounds: mechanisms, and how often each was used.
        delta: the failure probability that epsilon is stated at.

    Returns:
        Epsilon, an upper bound; 0 for no round.

    Raises:
        MissingExtraError: (operator) dp-accounting is not installed.
    """
    counts: Counter[Mechanism] = Counter()
    for mechanism, count in rounds:
        counts[mechanism] += count
    listed = tuple((mechanism, count) for mechanism, count in counts.items() if count)
    return _epsilon(listed, delta) if listed else 0.0


@lru_cache(maxsize=4096)
def _epsilon(listed: tuple[tuple[Mechanism, int], ...], delta: float) -> float:
    library = _library()
    bound = _composed(library, library.rdp.RdpAccountant(orders=_ORDERS), listed, delta)
    if not bound <= _LARGE_EPSILON or any(mechanism.is_coarse for mechanism, _ in listed):
        return bound
    interval = min(_COARSEST, max(_FINEST, bound / 1000))
    losses = library.pld.PLDAccountant(value_discretization_interval=interval)
    return min(bound, _composed(library, losses, listed, delta))


def noise_for(epsilon: float, delta: float, sampling_rate: float, rounds: int) -> float:
    """The least noise multiplier with which so many rounds stay inside (epsilon, delta), to 0.1 %.

    Raises:
        ConfigurationError: (operator) no noise up to `MAX_NOISE_MULTIPLIER` is enough.
    """

    def is_enough(noise_multiplier: float) -> bool:
        return epsilon_of([(Mechanism(noise_multiplier, sampling_rate), rounds)], delta) <= epsilon

    low, high = 0.01, MAX_NOISE_MULTIPLIER
    if not is_enough(high):
        raise ConfigurationError(f"no noise makes {rounds} rounds cost only epsilon {epsilon:g}")
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def rounds_left(
    spent: Iterable[tuple[Mechanism, int]],
    mechanism: Mechanism,
    epsilon: float,
    delta: float,
    *,
    most: int = 100_000,
) -> int:
    """How many more rounds of a mechanism fit into the budget; `most` where there are at least so many."""
    listed = list(spent)

    def fits(rounds: int) -> bool:
        return epsilon_of([*listed, (mechanism, rounds)], delta) <= epsilon

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _composed(library: Any, accountant: Any, rounds: Iterable[tuple[Mechanism, int]], delta: float) -> float:
    for mechanism, count in rounds:
        gaussian = library.GaussianDpEvent(mechanism.noise_multiplier)
        event = library.PoissonSampledDpEvent(mechanism.sampling_rate, gaussian)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def _library() -> Any:
    try:
        import dp_accounting  # with scipy: a second that only a private run waits for
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "differential privacy needs the package dp-accounting", hint="pip install 'shoal[privacy]'"
        ) from error
    return dp_accounting
