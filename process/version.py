"""Which Shoal this is: what `--version` prints and what an agent says at its birth."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"
