"""`shoal-cloud model`: import a bundle, list and show what was imported."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import msgspec

from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_facts, print_json, print_table, say
from cloud_server.db.releases import ModelRow, load_models
from cloud_server.deployment import Deployment
from cloud_server.release.publish import DEFAULT_RING
from wire.errors import ConfigurationError
from wire.manifest import Manifest


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="imported models")
    listing.set_defaults(handler=_list)
    show = actions.add_parser("show", help="one model")
    show.add_argument("model", metavar="MODEL", help="its name or the beginning of its graphs hash")
    show.set_defaults(handler=_show)
    bring = actions.add_parser("import", help="sign a bundle's graphs and release its parameters")
    bring.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    bring.add_argument("--ring", default=DEFAULT_RING, help=f"ring of its first release ({DEFAULT_RING})")
    bring.add_argument("--no-release", action="store_true", help="sign the graphs only")
    bring.set_defaults(handler=_import)
    for command in (listing, show, bring):
        add_state(command)
        add_json(command)


def _list(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        rows = [_facts(row) for row in _models(deployment)]
    if options.json:
        print_json(rows)
    else:
        print_table(rows, ("name", "graphs_sha256", "task", "params", "input_shape", "created"))
    return 0


def _show(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        row = find_model(_models(deployment), options.model)
    manifest = Manifest.from_bytes(row.manifest)
    files = {ref.name: ref.size_bytes for ref in (*manifest.files, *manifest.cloud_files)}
    facts = {**_facts(row), "checkpoint_sha256": row.checkpoint_sha256, "files": files}
    facts["labels"] = list(manifest.task.labels)
    (print_json if options.json else print_facts)(facts)
    return 0


def _import(options: argparse.Namespace) -> int:
    from models.bundle import Bundle

    bundle = Bundle.open(options.bundle)
    with Deployment.open(options.state, os.environ) as deployment:
        deployment.keep_bundle(bundle)
        row = deployment.publisher.import_model(bundle)
        version = 0
        if not options.no_release:
            version = deployment.publisher.propose_bundle(bundle).version
            deployment.publisher.publish(version, options.ring)
    result = {"name": row.name, "graphs_sha256": row.graphs_sha256, "release_version": version}
    if options.json:
        print_json(result)
    say(f"imported {row.name} ({row.graphs_sha256[:12]})" + (f", release {version}" if version else ""))
    return 0


def find_model(rows: list[ModelRow], text: str) -> ModelRow:
    """The newest model of a name, or the one whose hash begins so.

    Raises:
        ConfigurationError: (operator) none, or several hashes begin so.
    """
    named = [row for row in rows if row.name == text]
    hashed = [row for row in rows if len(text) >= 4 and row.graphs_sha256.startswith(text)]
    if named:
        return named[-1]
    if len(hashed) != 1:
        what = "several models begin" if hashed else "no model is called or begins"
        raise ConfigurationError(f"{what} {text!r}", hint="`shoal-cloud model list` shows them all")
    return hashed[0]


def _models(deployment: Deployment) -> list[ModelRow]:
    with deployment.database.read() as connection:
        return load_models(connection)


def _facts(row: ModelRow) -> dict[str, Any]:
    manifest = Manifest.from_bytes(row.manifest)
    return {
        "name": row.name,
        "graphs_sha256": row.graphs_sha256,
        "task": manifest.task.kind,
        "metric": manifest.task.metric,
        "params": manifest.params_size,
        "input_shape": msgspec.to_builtins(manifest.input_shape),
        "created": row.created,
    }
