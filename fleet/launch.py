"""How a program of ours is started as a child: as a user starts it, or under something that breaks it.

Laws of the file: the program is the product's own command; what stands before it (a tracer, a preloaded clock) and
around it (variables) is the caller's, and is nothing for a fleet that nobody breaks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Launch:
    """One way of starting a program.

    Attributes:
        program: interpreter and code; the command's own arguments come behind it.
        prefix: what runs the program (`strace …`).
        environment: variables over those of this process.
        is_apart: in a session of its own: it and all its children can be ended together, and a Ctrl-C is not theirs.
    """

    program: tuple[str, ...]
    prefix: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    is_apart: bool = False

    def command(self, *arguments: str) -> list[str]:
        """What is executed."""
        return [*self.prefix, *self.program, *arguments]

    def variables(self, **more: str) -> dict[str, str]:
        """The child's environment: one thread for numbers, whatever the machine has."""
        return {**os.environ, "OMP_NUM_THREADS": "1", **more, **self.environment}


AGENT = Launch((sys.executable, "-c", "import sys; from edge_agent.cli import main; sys.exit(main())"))
CLOUD = Launch((sys.executable, "-c", "import sys; from cloud_server.cli import main; sys.exit(main())"))
