"""What this process has freed goes back to the system: glibc keeps freed memory for the next allocation, and a
device that trains once in hours would hold the peak of its last round all that time.

Laws of the file: it changes where memory comes from and goes to, never what the program does; where the C library
is not glibc, nothing happens. Sources: malloc_trim(3), mallopt(3).
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

_ARENA_MAX: Final = -8  # M_ARENA_MAX of <malloc.h>


def share_one_arena() -> bool:
    """Lets all threads allocate from one arena, for the life of the process; call it before there are threads.

    By default each thread gets an arena, and what one frees is not there for another: 2 MiB of a small agent. Its
    threads wait for each other at Python's own lock already.

    Returns:
        Whether the C library can.
    """
    mallopt = _function("mallopt")
    return mallopt is not None and mallopt(_ARENA_MAX, 1) == 1


def give_back() -> bool:
    """Gives the system every whole page that is free now; takes milliseconds, and later allocations fault anew.

    Returns:
        Whether the C library can.
    """
    trim = _function("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True


def _function(name: str) -> Any:
    """A function of the C library of this process, or None."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
