"""The enrolment of a first run, in a child process: X.509 code, and what a TLS connection leaves behind, cost
3 MiB that a running agent does not need.

Laws of the file: the token reaches the child by standard input, so no list of processes shows it; the child
says on standard error how it went, once. `python -m edge_agent.enrolment.first_run STATE` is the child. Source:
docs/architecture.md, "The agent".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from edge_agent.child import ChildTimeoutError, run_child
from process.exits import run_cli
from wire.errors import EnrolmentError

TIMEOUT_SECONDS: Final = 300.0
PATIENCE_SECONDS: Final = 240.0
"""A device that boots before its network, with all others of its site: it goes on asking for so long."""
_MAX_TOKEN_CHARS: Final = 65_536
_AGAIN: Final = "start it again: the same token serves until its answer has arrived"


def enrol_in_child(token: str, folder: Path) -> int:
    """`enrol.enrol` in a child process.

    Args:
        folder: the state folder.

    Returns:
        The child's exit code (`process/exits.py`); it has said why.

    Raises:
        EnrolmentError: it was killed, or did not come to an end.
    """
    told = token.encode(errors="replace") + b"\n"
    try:
        ended = run_child(
            "edge_agent.enrolment.first_run",
            [str(folder)],
            timeout_seconds=TIMEOUT_SECONDS,
            stdin=told,
            talks=True,
        )
    except ChildTimeoutError as error:
        raise EnrolmentError("the enrolment took too long", hint=_AGAIN) from error
    if ended.code < 0:
        raise EnrolmentError(f"the enrolment was ended by signal {-ended.code}", hint=_AGAIN)
    return ended.code


def main(arguments: Sequence[str]) -> int:
    """The child: enrols, and says so or why not."""
    import random

    from edge_agent.enrolment.enrol import enrol
    from edge_agent.enrolment.patience import Patience
    from process.clock import SystemClock
    from wire.backoff import Backoff, Retries

    (folder,) = arguments
    clock = SystemClock()
    patience = Patience(PATIENCE_SECONDS, Retries(Backoff(cap_seconds=30.0), random.SystemRandom()), clock)

    def work() -> None:
        token = sys.stdin.readline(_MAX_TOKEN_CHARS).strip()
        identity = enrol(token, Path(folder), clock=clock, patience=patience)
        print(f"enrolled {identity.device} in {identity.tenant}/{identity.fleet}", file=sys.stderr)

    return run_cli(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
