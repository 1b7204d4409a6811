"""`shoal-cloud model`: build a bundle, import it, list and show what was imported, tell what shaped a release."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cloud_server.audit.lineage import trace_lineage
from cloud_server.cli import add_json, add_state, ring_name
from cloud_server.cli.output import print_facts, print_json, print_table, say
from cloud_server.cli.signing import add_request, read_signed, write_request
from cloud_server.db.releases import ModelRow, load_models
from cloud_server.deployment import Deployment
from cloud_server.release.publish import DEFAULT_RING
from process.arguments import path, whole_number
from wire.errors import ConfigurationError, ShoalError
from wire.manifest import Manifest

if TYPE_CHECKING:  # a list of models must not load the tools that make them
    from cloud_server.release.signing_request import SigningRequest
    from models.bundle import Bundle
    from models.train_step import SamplePrivacy


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="imported models")
    listing.set_defaults(handler=_list)
    show = actions.add_parser("show", help="one model")
    show.add_argument("model", metavar="MODEL", help="its name or the beginning of its graphs hash")
    show.set_defaults(handler=_show)
    bring = actions.add_parser("import", help="sign a bundle's graphs and release its parameters")
    bring.add_argument("bundle", type=path, metavar="BUNDLE", help="the bundle's folder")
    bring.add_argument(
        "--ring", type=ring_name, default=DEFAULT_RING, help=f"ring of its first release ({DEFAULT_RING})"
    )
    bring.add_argument("--no-release", action="store_true", help="sign the graphs only")
    add_request(bring)
    bring.set_defaults(handler=_import)
    lineage = actions.add_parser("lineage", help="which rounds, devices and data shaped a release")
    lineage.add_argument("version", type=whole_number(1), help="the release")
    lineage.set_defaults(handler=_lineage)
    for command in (listing, show, bring, lineage):
        add_state(command)
        add_json(command)
    _configure_build(actions.add_parser("build", help="make a bundle of a torch module and samples"))


def _configure_build(build: argparse.ArgumentParser) -> None:
    build.add_argument(
        "source", metavar="MODULE:FUNCTION", help="makes the torch module; or a zoo model's name"
    )
    build.add_argument(
        "--data", type=path, required=True, metavar="FILE", help=".npz with x [N, …] and y [N]"
    )
    build.add_argument(
        "--out", type=path, required=True, metavar="DIR", help="the bundle; must not exist yet"
    )
    build.add_argument("--name", default="", help="name of the model (that of FUNCTION's module or the zoo)")
    build.add_argument(
        "--task",
        choices=("classification", "anomaly"),
        help="what it is trained for (classification; a zoo model's own)",
    )
    build.add_argument("--labels", default="", metavar="A,B,…", help="names of the classes, in order")
    build.add_argument(
        "--epochs",
        type=whole_number(0, 10_000),
        default=20,
        metavar="N",
        help="passes of the first training; 0 if trained (20)",
    )
    build.add_argument(
        "--seed", type=whole_number(0, 2**32 - 1), default=0, help="of the weights and the held-out fifth (0)"
    )
    build.add_argument("--summary", default="", help="a sentence for the model card")
    build.add_argument(
        "--path", type=path, default=Path(), metavar="DIR", help="where MODULE is looked for (.)"
    )
    build.add_argument(
        "--sample-clip", type=float, metavar="C", help="train by DP-SGD: longest gradient of one sample"
    )
    build.add_argument(
        "--sample-noise",
        type=float,
        metavar="Z",
        help="DP-SGD's noise on a step's sum of gradients, in C (1 with --sample-clip)",
    )
    add_json(build)
    build.set_defaults(handler=_build)


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


def _lineage(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment, deployment.database.read() as connection:
        found = trace_lineage(connection, options.version)
    if options.json:
        print_json(found)
        return 0
    generations, devices = found.pop("generations"), found.pop("devices")
    print_facts(found)
    for each in generations:
        began = each["began_with"]
        origin = f"release {began['release']}" if began["release"] else "the bundle"
        say(f"run {each['run']} began with {origin}")
        rounds = [
            {
                **row,
                "devices": len(row["replies"]),
                "examples": sum(one["examples"] for one in row["replies"]),
            }
            for row in each["rounds"]
        ]
        print()
        print_table(rounds, ("round", "devices", "examples", "base_sha256", "head_sha256", "entry"))
    print()
    print_table(devices, ("device", "rounds", "examples", "since", "first", "until"))
    return 0


def _build(options: argparse.Namespace) -> int:
    from models.own_model import build_own_model, load_maker
    from models.samples import read_samples
    from models.zoo import load

    privacy = _sample_privacy(options.sample_clip, options.sample_noise)
    is_of_zoo = ":" not in options.source
    kind = options.task or (load(options.source).task.kind if is_of_zoo else "classification")
    samples = read_samples(options.data, kind)
    maker = load_maker(options.source, options.path)
    bundle = build_own_model(
        maker,
        samples,
        name=options.name or options.source.partition(":")[0].rpartition(".")[2],
        out_dir=options.out,
        kind=kind,
        labels=tuple(label.strip() for label in options.labels.split(",") if label.strip()),
        epochs=options.epochs,
        seed=options.seed,
        summary=options.summary,
        privacy=privacy,
    )
    result = {
        "bundle": str(bundle.folder),
        "name": bundle.manifest.model,
        "graphs_sha256": bundle.manifest.graphs_sha256,
        "metrics": dict(bundle.release.metrics),
    }
    if options.json:
        print_json(result)
    say(f"built {bundle.folder}: {_metrics_text(bundle.release.metrics)}")
    say(f"next: shoal-cloud model import {bundle.folder}")
    return 0


def _sample_privacy(clip: float | None, noise: float | None) -> SamplePrivacy | None:
    if clip is None:
        if noise is not None:
            raise ConfigurationError("there is noise, and no clip to measure it by", hint="say --sample-clip")
        return None
    from models.train_step import SamplePrivacy

    return SamplePrivacy(clip, 1.0 if noise is None else noise)


def _metrics_text(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())) or "nothing measured"


def _import(options: argparse.Namespace) -> int:
    from models.build import check_bundle
    from models.bundle import Bundle

    signed = read_signed(options)
    with Deployment.open(options.state, os.environ) as deployment:
        bundle = Bundle.open(options.bundle)
        check_bundle(bundle)  # what cannot answer here would stop the service and every device later
        if options.request is not None:
            return write_request(
                options, deployment.publisher.request_model(bundle, fleet=deployment.full_name)
            )
        version = _take_in(deployment, bundle, "" if options.no_release else options.ring, signed)
    name, graphs = bundle.manifest.model, bundle.manifest.graphs_sha256
    if options.json:
        print_json({"name": name, "graphs_sha256": graphs, "release_version": version})
    say(f"imported {name} ({graphs[:12]})" + (f", release {version}" if version else ""))
    return 0


def _take_in(deployment: Deployment, bundle: Bundle, ring: str, signed: SigningRequest | None = None) -> int:
    """Imports a bundle and releases it to a ring (none, if empty), or leaves no trace that the service would follow.

    Returns:
        The release's version; 0 without one.
    """
    publisher, graphs = deployment.publisher, bundle.manifest.graphs_sha256
    is_known = publisher.is_imported(graphs)
    version = 0
    try:
        deployment.keep_bundle(bundle)
        publisher.import_model(bundle, signed=signed)
        if ring:
            version = publisher.propose_bundle(bundle).version
            publisher.publish(version, ring)
    except BaseException:  # an interrupt too
        if not is_known:
            _withdraw(deployment, graphs, version)
        raise
    return version


def _withdraw(deployment: Deployment, graphs: str, version: int) -> None:
    # Whatever it is that fails now, the first error is the one to tell.
    with contextlib.suppress(ShoalError):
        # Once its parameters are signed the version is taken for good, and asking again finishes the books.
        if version not in deployment.repository.releases():
            deployment.publisher.withdraw(graphs)
            shutil.rmtree(deployment.folder.bundle(graphs), ignore_errors=True)


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
