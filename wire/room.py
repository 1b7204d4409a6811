"""Room for bytes that are made piece by piece: what is about to be written over is not cleared first.

Clearing a megabyte that is not in the processor's caches takes as long as encrypting it. Laws of the file: who
asks for room writes all of it before anybody else sees it, because until then it holds what lay there before.
Source: `PyBytes_FromStringAndSize` (Python/C API: without a string the bytes are uninitialized, and may be written
while nobody else knows them).
"""

from __future__ import annotations

import ctypes
from io import BytesIO
from typing import Any, Final

_PYTHON: Final[Any] = getattr(ctypes, "pythonapi", None)
# A prototype of our own: setting the types on `ctypes.pythonapi` would set them for the whole process.
_uncleared: Final = (
    ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
        ("PyBytes_FromStringAndSize", _PYTHON)
    )
    if hasattr(_PYTHON, "PyBytes_FromStringAndSize")
    else lambda _, size: bytes(size)
)


def room(size_bytes: int) -> BytesIO:
    """A file of `size_bytes` in memory, at its start; `getvalue` takes its content without a copy.

    Raises:
        MemoryError: so much is not there.
    """
    # The file holds the only reference, so it writes in place.
    return BytesIO(_uncleared(None, size_bytes))
