"""`shoal-cloud sign`: signs a request on a machine that no network reaches.

Law of the file: it needs the base install and the offline keys, no state folder and no extra.
"""

from __future__ import annotations

import argparse

from cloud_server.cli import add_json
from cloud_server.cli.output import print_json, say
from cloud_server.cli.signing import read_request, write_new
from cloud_server.keys import read_offline_keys
from cloud_server.release.signing_request import SigningRequest
from process.arguments import path
from wire.errors import ConfigurationError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request", type=path, metavar="FILE", help="as --request of another command wrote it")
    parser.add_argument(
        "--keys",
        type=path,
        metavar="DIR",
        help="the offline keys that sign; without it the request is shown only",
    )
    parser.add_argument(
        "--bundle", type=path, metavar="DIR", help="sign only if the graphs are those of this bundle"
    )
    parser.add_argument("--out", type=path, metavar="FILE", help="the signed request, a new file")
    add_json(parser)
    parser.set_defaults(handler=_sign)


def _sign(options: argparse.Namespace) -> int:
    request = SigningRequest.from_bytes(read_request(options.request))
    for line in request.changes():
        say(line)
    if options.bundle is not None:
        say(f"{request.check_bundle(options.bundle)} graph files are those of {options.bundle}")
    if (options.keys is None) != (options.out is None):
        raise ConfigurationError(
            "--keys and --out go together", hint="without both, the request is shown only"
        )
    if options.keys is not None:
        request = request.signed(read_offline_keys(options.keys))
        write_new(options.out, request.to_bytes())
        say(f"wrote {options.out}")
    signers = request.signed_by()
    if options.json:
        print_json({"role": request.role, "signed_by": signers, "threshold": request.threshold})
    missing = request.threshold - len(signers)
    say(f"{missing} more signatures are needed" if missing > 0 else "it has the signatures that it needs")
    return 0
