"""The heads of a run one after another, and how old an update is by them: what says whether it may still count.

Laws of the file: as of `ledger.py`; an age is counted in heads that were committed, from the head that an update was
trained on by its own word, and never read from the product's own numbers. Sources: docs/architecture.md ("Buffered
rounds"); Nguyen et al., arXiv:2106.06639.
"""

from __future__ import annotations


class Heads:
    """The heads that a run has had.

    Args:
        max_staleness: so many heads may have come after the one that an update was trained on; 0 where each round folds
            updates of its own base only.
    """

    def __init__(self, max_staleness: int = 0) -> None:
        self._max_staleness = max_staleness
        self._order: dict[str, int] = {}
        self._counted: dict[str, int] = {}

    def moved(self, base_sha256: str, head_sha256: str) -> str:
        """A head was committed; what is wrong with where it comes from, empty when nothing is."""
        self._order.setdefault(base_sha256, len(self._order))
        if self._order[base_sha256] != len(self._order) - 1:
            return "does not stand on the newest head"
        if head_sha256 in self._order:
            return "is a head that was there before"
        self._order[head_sha256] = len(self._order)
        return ""

    def age(self, trained_on: str, base_sha256: str) -> int | None:
        """How many heads came after the one that an update was trained on, up to a base; None for no head of ours."""
        first, last = self._order.get(trained_on), self._order.get(base_sha256)
        return None if first is None or last is None else last - first

    def counted(self, update: str, trained_on: str, base_sha256: str, round_number: int) -> tuple[int, str]:
        """An update counts in a round; its age, and what is wrong with that, empty when nothing is."""
        before = self._counted.setdefault(update, round_number)
        if before != round_number:
            return 0, f"update {update} counts in rounds {before} and {round_number}: doubled"
        age = self.age(trained_on, base_sha256)
        if age is None:
            return 0, f"update {update} was trained on no head of the run"
        if not 0 <= age <= self._max_staleness:
            return age, f"update {update} is {age} heads old and counts in round {round_number}"
        return age, ""

    def too_stale(self, trained_on: str) -> bool:
        """Whether what was trained on this head may not count in a round that stands on the newest."""
        first = self._order.get(trained_on)
        return first is not None and len(self._order) - 1 - first > self._max_staleness
