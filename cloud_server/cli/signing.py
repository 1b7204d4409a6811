"""Options of commands whose signature may come from a machine that no network reaches: `--request` and `--signed`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cloud_server.cli.output import print_json, say
from cloud_server.release.signing_request import MAX_BYTES, SigningRequest
from process.arguments import path
from wire.errors import ConfigurationError, StorageError


def add_request(parser: argparse.ArgumentParser) -> None:
    """Both options; never both of them in one command line."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--request", type=path, metavar="FILE", help="sign nothing here: write what is to be signed elsewhere"
    )
    either.add_argument(
        "--signed", type=path, metavar="FILE", help="that request, as `shoal-cloud sign` gave it back"
    )


def read_signed(options: argparse.Namespace) -> SigningRequest | None:
    """The request that came back; None where it is signed here."""
    return None if options.signed is None else SigningRequest.from_bytes(read_request(options.signed))


def write_request(options: argparse.Namespace, request: SigningRequest) -> int:
    """Writes a request for another machine; the exit code of a command that does nothing else."""
    write_new(options.request, request.to_bytes())
    if options.json:
        print_json(
            {
                "role": request.role,
                "request": str(options.request),
                "version": request.metadata.signed.version,
            }
        )
    say(f"wrote {options.request}: sign it where the keys are, and come back with --signed")
    say(f"next, there: shoal-cloud sign {options.request.name} --keys DIR --out signed.json")
    return 0


def read_request(file: Path) -> bytes:
    """Raises `StorageError` where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}", path=str(file)) from error


def write_new(file: Path, data: bytes) -> None:
    """Writes a file that is not there yet; raises `ConfigurationError` or `StorageError`."""
    try:
        with file.open("xb") as opened:
            opened.write(data)
    except FileExistsError as error:
        raise ConfigurationError(f"{file} is there already", hint="name another file") from error
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror}", path=str(file)) from error
