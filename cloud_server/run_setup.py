"""From an aggregator's settings to the run that it drives: model, strategy or ServerApp, gate, refinement.

Laws of the file: wiring only; what the operator named and is not there is a ConfigurationError before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud_server.aggregate.fold import choose_device
from cloud_server.assembly import Assembled, Base, RunConfig, check_bases, make_run_parts, with_masks
from cloud_server.db.releases import load_models
from cloud_server.deployment import Deployment
from cloud_server.flower.serverapp import load_server_app, make_serverapp_runner
from cloud_server.flower.strategies import build_strategy, check_quorum, is_folded, needs_reference
from cloud_server.holdout import load_holdout
from cloud_server.privacy.budget import CENTRAL, PrivateRun
from cloud_server.privacy.run import check_private, private_run
from cloud_server.refine.opening import open_refinery
from cloud_server.refine.reference import reference_config
from cloud_server.refine.refinement import RefineConfig, Refinery
from cloud_server.release.gate import GatePolicy
from cloud_server.release.releaser import Holdout
from cloud_server.rounds.runner import RoundRunner
from cloud_server.rounds.state import RoundPolicy
from cloud_server.secure.helper_client import AskedHelper
from cloud_server.secure.opening import MaskingRules, check_setup, make_runner, masking_rules, open_helper
from cloud_server.settings import SecureSettings
from cloud_server.strikes import StrikePolicy
from models.bundle import Bundle
from wire.errors import BundleError, ConfigurationError

if TYPE_CHECKING:  # flwr has its own door
    from cloud_server.flower.serverapp import ServerApp


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """All that the operator named, opened: what is left can only fail by the disk.

    Attributes:
        trusted: for FLTrust's reference; None under every other strategy.
        app: drives the rounds instead of the strategy; None without one.
        helper: of a run with two servers.
    """

    bundle: Bundle
    config: RunConfig
    holdout: Holdout | None
    refinery: Refinery | None
    trusted: Refinery | None
    app: ServerApp | None
    app_config: Mapping[str, Any]
    helper: AskedHelper | None = None


def prepare_run(deployment: Deployment, serverapp: str = "") -> PreparedRun | None:
    """Opens what the settings name, before anything of the service is started; None while no model is imported.

    Args:
        serverapp: `module:app`, searched for last in the folder that the service was started in; over the settings'.

    Raises:
        ConfigurationError: (operator) a model, strategy, parameter, device, module or app that does not exist.
        BundleError: (disk) the model is damaged.
        DataError: (operator) held-out or refinement data that cannot be read.
    """
    bundle = chosen_bundle(deployment)
    config = run_config(deployment)
    settings = deployment.settings.run
    app = None
    if name := serverapp or settings.serverapp:
        app = load_server_app(name, Path.cwd())
        # The app brings its own strategy; ours only weighs the metrics of evaluations.
        config = replace(config, strategy="FedAvg", strategy_parameters={})
    # Made again with the run; here to say at once what cannot be made.
    strategy = build_strategy(config.strategy, config.strategy_parameters)
    is_central = config.privacy is not None and config.privacy.plan.mode == CENTRAL
    check_quorum(strategy, config.policy.quorum)
    check_bases(config, strategy, has_app=app is not None)
    check_setup(config.masking, strategy, has_app=app is not None, is_central=is_central)
    helper = open_helper(deployment)
    is_trusting = needs_reference(strategy)
    choose_device(config.fold_device)
    if is_trusting:
        _check_trusted_data(deployment)
    if bundle is None:
        return None
    holdout, refinery = load_holdout(deployment, bundle.manifest), _refinery(deployment, bundle)
    trusted = _trusted(deployment, bundle) if is_trusting else None
    if config.privacy is not None:
        check_private(
            with_masks(config.policy, config.masking),
            config.privacy.plan.mode,
            buffers_size=bundle.manifest.buffers_size,
            is_folded=is_folded(strategy),
            has_holdout=holdout is not None,
            has_app=app is not None,
        )
    return PreparedRun(bundle, config, holdout, refinery, trusted, app, settings.parameters, helper)


def open_run(
    prepared: PreparedRun, base: Base, cloud: Assembled, *, wake: Callable[[], None]
) -> tuple[RoundRunner, Callable[[], None]]:
    """The runner of a prepared run, not resumed yet, and what ends it.

    Args:
        wake: called from a ServerApp's thread when `tick` has something to do.

    Raises:
        ConfigurationError: (operator) a strategy that does not go with the model.
    """
    plan, ports = make_run_parts(
        base,
        cloud,
        prepared.bundle,
        prepared.config,
        prepared.holdout,
        prepared.refinery,
        prepared.trusted,
    )
    if prepared.app is None:
        rules = prepared.config.masking
        runner = make_runner(
            plan, ports, rules, registry=base.registry, downlink=cloud.downlink, helper=prepared.helper
        )
        return runner, lambda: None
    return make_serverapp_runner(plan, ports, prepared.app, config=prepared.app_config, wake=wake)


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
    return _open_refinery(deployment, bundle, config)


def _check_trusted_data(deployment: Deployment) -> None:
    data = deployment.folder.root / deployment.settings.refine.data
    if not data.is_file():
        raise ConfigurationError(
            f"FLTrust needs clean labelled samples of the operator's own, and {data} is not there",
            hint="put an .npz with x and y there, or name one in refine.data",
            path=str(data),
        )


def _trusted(deployment: Deployment, bundle: Bundle) -> Refinery:
    return _open_refinery(deployment, bundle, reference_config(deployment.settings.train.config()))


def _open_refinery(deployment: Deployment, bundle: Bundle, config: RefineConfig) -> Refinery:
    settings = deployment.settings.refine
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
            mode=run.mode,
            max_staleness=run.max_staleness,
            staleness_exponent=run.staleness_exponent,
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
        max_holdout_drop=run.max_holdout_drop,
        masking=_masking(settings.secure),
        privacy=_private(deployment),
        norm_factor=settings.screening.norm_factor,
        strikes=StrikePolicy(
            limit=settings.screening.strike_limit,
            clean_rounds=settings.screening.clean_rounds,
            probation_seconds=settings.screening.probation_hours * 3600.0,
        ),
    )


def _masking(secure: SecureSettings) -> MaskingRules | None:
    return masking_rules(secure.policy, secure.dropout, secure.colluding, secure.wait_seconds)


def _private(deployment: Deployment) -> PrivateRun | None:
    plan = deployment.settings.privacy.plan()
    return None if plan is None else private_run(plan, deployment.database, deployment.folder.keys)


def chosen_bundle(deployment: Deployment) -> Bundle | None:
    """The model of the settings, or the newest import; None while nothing is imported.

    Raises:
        ConfigurationError: (operator) the settings name a model that was never imported.
        BundleError: (disk) its files are damaged or gone.
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
    if not rows:
        return None
    try:
        return Bundle.open(deployment.bundle_folder(rows[-1].graphs_sha256))
    except BundleError as error:
        raise BundleError(
            f"the model {rows[-1].name} cannot be loaded: {error}",
            hint="remove its folder and import the bundle again, or choose another model: run.model in settings.toml",
            graphs_sha256=rows[-1].graphs_sha256,
        ) from error
