"""How many files this process and its children may have open: each connection of a fleet is one, on both ends."""

from __future__ import annotations

import resource

from wire.errors import ConfigurationError

SPARE = 512
"""For libraries, logs, databases and what else is open beside connections."""


def allow_open_files(count: int) -> None:
    """Raises the limit of this process, and of every child that it starts from now on.

    Raises:
        ConfigurationError: (operator) the system does not allow so many; the hint says how to ask for them.
    """
    wanted = count + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _is_enough(soft, wanted):
        return
    if not _is_enough(hard, wanted):
        raise ConfigurationError(
            f"{count} connections need {wanted} open files in one process, and the system allows {hard}",
            hint=f"`ulimit -Hn {wanted}` as root, LimitNOFILE={wanted} in a systemd unit, or fewer --devices",
            wanted=wanted,
            allowed=hard,
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _is_enough(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted
