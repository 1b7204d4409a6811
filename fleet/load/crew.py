"""The processes of light agents, as who started them sees them."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

import msgspec

from fleet.load.crowd import CrowdPlan
from fleet.load.tally import Tally, total
from wire.errors import RoundError

_COMMAND = (sys.executable, "-c", "import sys; from fleet.load.crowd import main; sys.exit(main())")
_STOP_SECONDS = 60.0


class _Member:
    """One process and what it said last."""

    def __init__(self, plan: CrowdPlan, log_file: Path) -> None:
        self.tally = Tally()
        self.log_file = log_file
        with log_file.open("wb") as log:
            self.process = subprocess.Popen(
                _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        if self.process.stdin is not None:
            self.process.stdin.write(msgspec.json.encode(plan) + b"\n")
            self.process.stdin.flush()
        self._reader = threading.Thread(target=self._read, name="crowd-reader", daemon=True)
        self._reader.start()

    def leave(self) -> None:
        """Asks it to end."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()

    def wait(self) -> None:
        """Until it has ended and all that it said is read; by force after a minute."""
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        if self.process.stdout is None:
            return
        decoder = msgspec.json.Decoder(Tally)
        for line in self.process.stdout:
            self.tally = decoder.decode(line)


class Crew:
    """All processes of a load. A context manager: leaving it ends them."""

    def __init__(self, plans: list[CrowdPlan], logs: Path) -> None:
        self._members: list[_Member] = []
        try:
            for number, plan in enumerate(plans):
                self._members.append(_Member(plan, logs / f"crowd-{number}.log"))
        except BaseException:
            self.stop()
            raise

    @property
    def process_ids(self) -> list[int]:
        """Of all of them."""
        return [member.process.pid for member in self._members]

    def tally(self) -> Tally:
        """The sum of what each said last: not older than a second or two."""
        return total(member.tally for member in self._members)

    def check(self) -> None:
        """Looks whether all are alive.

        Raises:
            RoundError: one ended by itself; says where its log is.
        """
        for member in self._members:
            code = member.process.poll()
            if code is not None:
                raise RoundError(f"a crowd ended with code {code}", hint=f"see {member.log_file}")

    def stop(self) -> Tally:
        """Ends them politely, all at once; returns what they did. Safe to call twice."""
        for member in self._members:
            member.leave()
        for member in self._members:
            member.wait()
        return self.tally()

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
