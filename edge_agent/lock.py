"""One agent for each state folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from wire.errors import ConfigurationError, StorageError

LOCK_NAME: Final = "agent.lock"


def lock_state(folder: Path) -> int:
    """Takes the state folder for this process, until it ends; returns the lock's descriptor.

    Raises:
        ConfigurationError: (operator) another agent has it.
        StorageError: the folder cannot be written.
    """
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigurationError(
            f"another agent runs on {folder}", hint="stop it, or give this one its own --state"
        ) from error
    return descriptor


def is_locked(folder: Path) -> bool:
    """Whether an agent runs on a state folder."""
    try:
        os.close(lock_state(folder))
    except ConfigurationError:
        return True
    except StorageError:
        return False
    return False
