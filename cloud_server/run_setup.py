"""From an aggregator's settings to the run that it drives: model, strategy or ServerApp, gate, refinement.

Laws of the file: wiring only; what the operator named and is not there is a ConfigurationError before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cloud_server.assembly import Base, RunConfig, make_run_parts
from cloud_server.db.releases import load_models
from cloud_server.deployment import Deployment
from cloud_server.downlink import Downlink
from cloud_server.flower.serverapp import load_server_app, make_serverapp_runner
from cloud_server.holdout import load_holdout
from cloud_server.refine.opening import open_refinery
from cloud_server.refine.refinement import RefineConfig, Refinery
from cloud_server.release.gate import GatePolicy
from cloud_server.rounds.runner import RoundRunner
from cloud_server.rounds.state import RoundPolicy
from models.bundle import Bundle
from wire.errors import ConfigurationError


def open_run(
    deployment: Deployment,
    base: Base,
    downlink: Downlink,
    bundle: Bundle,
    *,
    serverapp: str,
    wake: Callable[[], None],
) -> tuple[RoundRunner, Callable[[], None]]:
    """The runner that the settings describe, not resumed yet, and what ends it.

    Args:
        serverapp: `module:app`, searched for last in the folder that the service was started in; empty for a strategy.
        wake: called from a ServerApp's thread when `tick` has something to do.

    Raises:
        ConfigurationError: (operator) a strategy, parameter, device, module or app that does not exist.
        DataError: (operator) held-out or refinement data that cannot be read.
    """
    config = run_config(deployment)
    refinery = _refinery(deployment, bundle)
    if not serverapp:
        plan, ports = make_run_parts(base, downlink, bundle, config, load_holdout(deployment), refinery)
        return RoundRunner(plan, ports), lambda: None
    app = load_server_app(serverapp, Path.cwd())
    settings = deployment.settings.run
    # The app brings its own strategy; ours only weighs the metrics of evaluations.
    plain = replace(config, strategy="FedAvg", strategy_parameters={})
    plan, ports = make_run_parts(base, downlink, bundle, plain, load_holdout(deployment), refinery)
    return make_serverapp_runner(plan, ports, app, config=settings.parameters, wake=wake)


def _refinery(deployment: Deployment, bundle: Bundle) -> Refinery | None:
    settings = deployment.settings.refine
    if not settings.epochs:
        return None
    config = RefineConfig(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        max_change=settings.max_change,
        is_mixed=settings.mixed,
    )
    return open_refinery(
        bundle.manifest,
        settings.model or bundle.manifest.model,
        deployment.folder.root / settings.data,
        config,
        device=deployment.settings.compute.device,
        folder=Path.cwd(),
    )


def run_config(deployment: Deployment) -> RunConfig:
    """The run that the settings describe."""
    settings, run = deployment.settings, deployment.settings.run
    return RunConfig(
        run=run.name,
        strategy=run.strategy,
        strategy_parameters=run.parameters,
        policy=RoundPolicy(
            quorum=run.quorum,
            goal=run.goal,
            rounds=run.rounds,
            round_seconds=run.deadline_seconds,
            evaluate_seconds=run.evaluate_seconds,
            evaluate_every=run.evaluate_every,
            pause_seconds=run.pause_seconds,
        ),
        train=settings.train.config(),
        gate=GatePolicy(
            min_gain=settings.gate.min_gain,
            max_operator_drop=settings.gate.max_operator_drop,
            max_bytes=settings.gate.max_bytes,
            min_examples=settings.gate.min_examples,
        ),
        ring=settings.enrolment.ring,
        fold_device=settings.compute.device,
        max_head_change=run.max_head_change,
    )


def chosen_bundle(deployment: Deployment) -> Bundle | None:
    """The model of the settings, or the newest import; None while nothing is imported.

    Raises:
        ConfigurationError: (operator) the settings name a model that was never imported.
    """
    with deployment.database.read() as connection:
        rows = load_models(connection)
    wanted = deployment.settings.run.model
    if wanted:
        rows = [row for row in rows if wanted in (row.name, row.graphs_sha256)]
        if not rows:
            raise ConfigurationError(
                f"the model {wanted!r} of settings.toml was never imported",
                hint="shoal-cloud model import BUNDLE, or change run.model",
            )
    return Bundle.open(deployment.folder.bundle(rows[-1].graphs_sha256)) if rows else None
