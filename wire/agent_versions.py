"""Whether an agent is new enough. Pure.

Law of the file: versions are compared number by number, as far as they are numbers: `0.10.0` is newer than `0.9`,
and `0.9.0rc1` counts as `0.9.0`; what cannot be read is older than everything, since a device may say anything.
"""

from __future__ import annotations

import re
from typing import Final

from wire.errors import ConfigurationError

_NUMBERS: Final = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9}){0,3}")
_PARTS: Final = 4
TOO_OLD_HINT: Final = "update the agent: until then it answers and gets releases, but is not asked for rounds"


def read_version(text: str) -> tuple[int, ...]:
    """The numbers of a version, four of them; all −1 for what is none."""
    found = _NUMBERS.match(text)
    if found is None:
        return (-1,) * _PARTS
    numbers = [int(part) for part in found[0].split(".")]
    return tuple(numbers + [0] * (_PARTS - len(numbers)))


def is_new_enough(version: str, least: str) -> bool:
    """Whether an agent of this version may take part.

    Args:
        least: the oldest that may; empty for any.
    """
    return not least or read_version(version) >= read_version(least)


def check_least(least: str) -> str:
    """A setting, held to what can be compared.

    Raises:
        ConfigurationError: (operator) it is no version.
    """
    if least and _NUMBERS.fullmatch(least) is None:
        raise ConfigurationError(
            f"enrolment.min_agent_version: {least[:80]!r} is no version", hint='write it as "0.2.0"'
        )
    return least
