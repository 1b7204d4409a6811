"""`python -m tests.fuzz.guided`: a search led by coverage, with atheris (libFuzzer), one decoder after the other.

Starts from what is stored in tests/fuzz/corpus/, leaves libFuzzer's own corpus in build/fuzz/corpus/, and with
`--keep` stores the short inputs that reach something new. Atheris has wheels for some interpreters only: where there
is none, this says so and ends with 0, because the seeded run of `python -m tests.fuzz` needs nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tests.fuzz.corpus import MAX_INPUT_BYTES, store, stored

if TYPE_CHECKING:
    from tests.fuzz.decoders import Decoder

PIN = "atheris==3.0.0"
WORK = Path("build/fuzz")
Arc = tuple[str, int, int]


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz.guided", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="DECODER", help="(default: all)")
    parser.add_argument("--seconds", type=int, default=10, help="for each decoder (default: %(default)s)")
    parser.add_argument(
        "--keep", action="store_true", help="store what was worth keeping in tests/fuzz/corpus/"
    )
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.inside:
        return search(arguments.inside, [*rest, *arguments.names])
    if not is_installed():
        print(
            f"{PIN} has no wheel for this interpreter or the package index is out of reach: no guided search"
        )
        return 0
    from tests.fuzz.decoders import (
        DECODERS,
    )  # not at the top: atheris instruments `wire` when it is imported first

    by_name = {decoder.name: decoder for decoder in DECODERS}
    failed = []
    for name in arguments.names or by_name:
        folder = WORK / "corpus" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate([*by_name[name].seeds, *stored(name)]):
            (folder / f"stored-{number}").write_bytes(data)
        options = [
            f"-max_total_time={arguments.seconds}",
            "-timeout=10",
            "-rss_limit_mb=2048",
            f"-artifact_prefix={WORK}/",
        ]
        done = run_inside(name, options, folder)
        print(
            f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'nothing said'}",
            flush=True,
        )
        if done.returncode != 0:
            print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
            failed.append(name)
        elif arguments.keep:
            keep(by_name[name], folder)
    print(f"failed: {', '.join(failed)}" if failed else "nothing found")
    return 1 if failed else 0


def is_installed() -> bool:
    """Whether atheris is there, now or after installing its wheel."""
    if importlib.util.find_spec("atheris"):
        return True
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", PIN]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def run_inside(name: str, options: list[str], *folders: Path) -> subprocess.CompletedProcess[str]:
    """libFuzzer takes the process over, so each decoder has one of its own."""
    command = [sys.executable, "-m", "tests.fuzz.guided", "--inside", name, *options, *map(str, folders)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def keep(decoder: Decoder, folder: Path) -> None:
    """Stores the inputs, short ones first, that take a branch which no stored one before them took."""
    reached: set[Arc] = set()
    kept = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        data = path.read_bytes()
        arcs = arcs_of(decoder, data) if len(data) <= MAX_INPUT_BYTES else set()
        if not arcs <= reached:
            reached |= arcs
            kept.append(data)
    store(decoder.name, kept)


def arcs_of(decoder: Decoder, data: bytes) -> set[Arc]:
    """Which line of `wire/` followed which while an input was decoded."""
    from wire.errors import ShoalError

    arcs: set[Arc] = set()

    def enter(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if Path(frame.f_code.co_filename).parent.name != "wire":
            return None
        last = frame.f_lineno

        def step(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
            nonlocal last
            arcs.add((frame.f_code.co_filename, last, frame.f_lineno))
            last = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        decoder.decode(data)
    except ShoalError:
        pass
    finally:
        sys.settrace(None)
    return arcs


def search(name: str, options: list[str]) -> int:
    """Runs libFuzzer on one decoder; returns only when it is done without a finding."""
    import atheris

    with atheris.instrument_imports(include=["wire"]):
        from tests.fuzz.decoders import DECODERS
        from wire.errors import ShoalError

    (decoder,) = (decoder for decoder in DECODERS if decoder.name == name)

    def one_input(data: bytes) -> None:
        try:
            decoder.decode(data)
        except ShoalError:
            return

    atheris.Setup([f"atheris {importlib.metadata.version('atheris')}", *options], one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
