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
from pathlib import Path

from tests.fuzz.corpus import store, stored

PIN = "atheris==3.0.0"
WORK = Path("build/fuzz")


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
        return search(arguments.inside, rest)
    if not is_installed():
        print(
            f"{PIN} has no wheel for this interpreter or the package index is out of reach: no guided search"
        )
        return 0
    from tests.fuzz.decoders import DECODERS

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
            keep(name, folder)
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


def keep(name: str, folder: Path) -> None:
    """Stores the smallest set of inputs that reaches what the whole corpus reaches."""
    least = WORK / "least" / name
    least.mkdir(parents=True, exist_ok=True)
    for old in least.iterdir():
        old.unlink()
    run_inside(name, ["-merge=1"], least, folder)
    store(name, (path.read_bytes() for path in least.iterdir()))


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
