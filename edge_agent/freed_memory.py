"""What this process has freed goes back to the system: glibc keeps freed memory for the next allocation, and a
device that trains once in hours would hold the peak of its last round all that time.

Laws of the file: it changes where memory comes from and goes to, never what the program does; where the C library
is not glibc, nothing happens. Sources: malloc_trim(3), mallopt(3).
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

_TRIM_THRESHOLD: Final = -1  # M_TRIM_THRESHOLD of <malloc.h>, and so on
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8

LARGE_BYTES: Final = 4 * 1024 * 1024
"""From here on a vector's buffers are worth keeping between jobs."""
_GLIBC_THRESHOLD: Final = 128 * 1024
_KEPT_BLOCK: Final = 32 * 1024 * 1024  # the most that mallopt takes
_KEPT_IN_ALL: Final = 256 * 1024 * 1024


def share_one_arena() -> bool:
    """Lets all threads allocate from one arena, for the life of the process; call it before there are threads.

    By default each thread gets an arena, and what one frees is not there for another: 2 MiB of a small agent. Its
    threads wait for each other at Python's own lock already.

    Returns:
        Whether the C library can.
    """
    mallopt = _function("mallopt")
    return mallopt is not None and mallopt(_ARENA_MAX, 1) == 1


def keep_large_buffers() -> bool:
    """Lets the buffers of a large model be used again until `give_back`, instead of being mapped anew each time.

    A train step over 10 MB of parameters takes some ten such buffers; to map and clear their pages costs as much as
    the step itself.

    Returns:
        Whether the C library can.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _KEPT_BLOCK) and mallopt(_TRIM_THRESHOLD, _KEPT_IN_ALL))


def give_back() -> bool:
    """Gives the system every whole page that is free now; takes milliseconds, and later allocations fault anew.

    Ends what `keep_large_buffers` began.

    Returns:
        Whether the C library can.
    """
    mallopt, trim = _function("mallopt"), _function("malloc_trim")
    if mallopt is None or trim is None:
        return False
    mallopt(_MMAP_THRESHOLD, _GLIBC_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, _GLIBC_THRESHOLD)
    trim(0)
    return True


def _function(name: str) -> Any:
    """A function of the C library of this process, or None."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
