"""The device's TUF client behind the command line of the official conformance suite.

The suite (https://github.com/theupdateframework/tuf-conformance, CLIENT-CLI.md) is not part of this repository. In a
clone of it, with this repository on PYTHONPATH: `pytest tuf_conformance --entrypoint "python -m
tests.tuf_conformance"`.
Expected to fail: `test_download_with_hash_algorithms[hashes1]`, a target with a SHA-512 alone, which devices refuse.
What is driven is `edge_agent.release.tuf_client` as it is, over plain HTTP instead of mutual TLS.
"""

from __future__ import annotations

import argparse
import http.client
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

from edge_agent.release.fetcher import CHUNK_BYTES
from edge_agent.release.tuf_client import METADATA_PATH, TARGETS_PATH, _Session, _session
from process.clock import SystemClock
from wire.errors import PeerError, RefusedError, ShoalError, TransportError

TRUSTED_ROOT = "trusted_root"
"""What `init` was given: a device starts from it at every check, as from the root of its enrolment."""
TIMEOUT_SECONDS = 20.0


class HttpFetcher:
    """`edge_agent.release.fetcher.Fetcher` over plain HTTP, from one place for metadata and one for targets."""

    def __init__(self, metadata_url: str, targets_url: str) -> None:
        self._places = {METADATA_PATH: metadata_url.rstrip("/"), TARGETS_PATH: targets_url.rstrip("/")}
        self.fetched_bytes_total = 0

    def fetch(self, path: str, *, offset: int = 0, limit_bytes: int) -> Iterator[bytes]:
        """See `Fetcher.fetch`."""
        place, _, rest = path.removeprefix("/").partition("/")
        url = urlsplit(f"{self._places['/' + place]}/{rest}")
        connection = http.client.HTTPConnection(url.netloc, timeout=TIMEOUT_SECONDS)
        try:
            connection.request("GET", quote(url.path, safe="/%"))
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise RefusedError(f"{path}: {response.status}", status=response.status)
            response.read(offset)
            left = limit_bytes
            while piece := response.read(CHUNK_BYTES):
                left -= len(piece)
                if left < 0:
                    raise PeerError(f"{path} is longer than allowed", limit_bytes=limit_bytes)
                self.fetched_bytes_total += len(piece)
                yield piece
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(f"GET {path}: {error}") from error
        finally:
            connection.close()


def main(arguments: list[str]) -> int:
    """The command; 0 if all was verified, 1 if not."""
    parser = argparse.ArgumentParser(prog="tuf_conformance")
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-base-url", default="")
    parser.add_argument("--target-dir", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    options = parser.parse_args(arguments)
    try:
        if options.command == "init":
            shutil.copyfile(options.trusted_root, options.metadata_dir / TRUSTED_ROOT)
            shutil.copyfile(options.trusted_root, options.metadata_dir / "root.json")
        else:
            session = _refreshed(options)
            for name in options.target_name if options.command == "download" else ():
                _bring(session, name, options.target_dir)
    except (ShoalError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _refreshed(options: argparse.Namespace) -> _Session:
    """The device's session: its staging folder keeps metadata and downloads where the suite wants them."""
    staging = options.metadata_dir / ".staging"
    staging.mkdir(exist_ok=True)
    link = staging / "metadata"
    if not link.is_symlink():
        link.symlink_to(options.metadata_dir.resolve(), target_is_directory=True)
    root = (options.metadata_dir / TRUSTED_ROOT).read_bytes()
    fetcher = HttpFetcher(options.metadata_url, options.target_base_url)
    return _session(staging, root, fetcher, SystemClock())


def _bring(session: _Session, name: str, folder: Path) -> None:
    """One target; files are kept by their hash on a device, and by their name for the suite."""
    data, place = session.file(name).read_bytes(), folder / quote(name, safe="")
    if not place.exists() or place.read_bytes() != data:
        place.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
