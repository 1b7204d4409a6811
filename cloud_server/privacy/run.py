"""A run with differential privacy: what goes with it, and what does not.

Laws of the file: wiring only; what would weaken the guarantee without a word is a ConfigurationError.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from cloud_server.db.engine import Database
from cloud_server.db.privacy import load_charges
from cloud_server.privacy.accountant import epsilon_of
from cloud_server.privacy.budget import CENTRAL, Budget, PrivateRun, mechanism_for
from cloud_server.privacy.central import CentralPrivacy
from cloud_server.privacy.keys import open_ledger_keys
from cloud_server.privacy.plan import PrivacyMode, PrivacyPlan
from cloud_server.privacy.sampling import PrivateStrategy
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.state import RoundPolicy
from wire.errors import ConfigurationError


def private_run(plan: PrivacyPlan, database: Database, keys: Path) -> PrivateRun:
    """What a service gives its private run: the plan, and the key of the ledger, made where there is no ledger yet.

    Args:
        keys: the folder of private keys.

    Raises:
        ConfigurationError: (operator) there is nothing to compute epsilon with, or the key file is not one.
        StorageError: (operator, disk) the ledger's key is missing.
    """
    epsilon_of([(mechanism_for(plan, 1), 1)], plan.delta)
    with database.read() as connection:
        is_new = not load_charges(connection, last=1)
    open_ledger_keys(keys, is_new=is_new)
    return PrivateRun(plan, lambda: open_ledger_keys(keys, is_new=False))


def check_private(
    policy: RoundPolicy,
    mode: PrivacyMode,
    *,
    buffers_size: int,
    is_folded: bool,
    has_holdout: bool,
    has_app: bool,
) -> None:
    """Refuses what does not go with differential privacy.

    Args:
        buffers_size: Q of the model.
        is_folded: the strategy is a function of the weighted mean.
        has_holdout: the operator has held-out data for the gate.
        has_app: a stock ServerApp drives the rounds.

    Raises:
        ConfigurationError: (operator) names what must be changed.
    """
    if has_app:
        raise _refusal("a ServerApp folds the updates itself", "leave run.serverapp empty")
    if not is_folded:
        raise _refusal(
            "this strategy looks at single updates", "use a strategy of the mean: FedAvg, FedAvgM, FedAdam, …"
        )
    if buffers_size:
        raise _refusal(
            "no noise covers the model's buffers (BatchNorm statistics)", "use a model with GroupNorm"
        )
    if policy.goal:
        raise _refusal("a goal lets one device's reply shut out another's", "set run.goal to 0")
    if policy.is_masked and mode == CENTRAL:
        raise _refusal(
            "the aggregator adds the noise to updates that it can clip",
            "set secure.policy to plain, or privacy.mode to distributed",
        )
    if not policy.is_masked and mode != CENTRAL:
        raise _refusal(
            "a device's noise alone is too little to hide its update",
            "set secure.policy to pairwise or two_server, or privacy.mode to central",
        )
    if policy.evaluate_every and not has_holdout:
        raise _refusal(
            "devices are not asked how good a model is, so the gate needs the operator's own data",
            "name held-out data in gate.holdout, or set run.evaluate_every to 0",
        )


def make_private(plan: RunPlan, ports: RunPorts, private: PrivateRun) -> tuple[RunPlan, RunPorts]:
    """The run's plan and ports with the budget, the sampling, the fixed clip and the noise in them.

    Raises:
        TrustError: (disk or an intruder) the ledger does not verify.
        ConfigurationError: (operator) so much noise that nothing of an update is left.
    """
    size, is_central = plan.manifest.params_size, private.plan.mode == CENTRAL
    budget = Budget(ports.database, plan.run, private, size)
    strategy = (
        CentralPrivacy(ports.strategy, budget, size)
        if is_central
        else PrivateStrategy(ports.strategy, budget)
    )
    plan = replace(
        plan,
        is_private=True,
        norm_factor=0.0,
        policy=replace(plan.policy, folds_always=is_central),
        train=msgspec.structs.replace(plan.train, clipping_norm=private.plan.clipping_norm),
    )
    return plan, replace(ports, strategy=strategy, budget=budget)


def _refusal(why: str, hint: str) -> ConfigurationError:
    return ConfigurationError(f"not under differential privacy: {why}", hint=hint)
