"""The folder that `--out` names, where a command begins with an empty one.

Law of the file: nothing is deleted that the command did not make itself, which its marker says.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from wire.errors import ConfigurationError, StorageError


def make_empty(out: Path, marker: str, maker: str) -> None:
    """Empties a folder that the command made, by its marker; makes it where there is none.

    Args:
        marker: name of the file that says whose folder it is.
        maker: what the command makes, for people.

    Raises:
        ConfigurationError: (operator) it is not empty, and not the command's.
        StorageError: it cannot be made.
    """
    is_foreign = any(out.iterdir()) and not (out / marker).is_file() if out.is_dir() else out.exists()
    if is_foreign:
        raise ConfigurationError(
            f"{out} is not empty and not a {maker}'s", hint="name a new folder with --out"
        )
    shutil.rmtree(out, ignore_errors=True)
    try:
        out.mkdir(parents=True)
        (out / marker).touch()
    except OSError as error:
        raise StorageError(f"{out} cannot be made: {error.strerror}") from error
