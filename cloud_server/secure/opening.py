"""From a run's settings to a runner with or without masks.

Law of the file: what does not go with masks is a ConfigurationError before anything runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from cloud_server.downlink import Downlink
from cloud_server.flower.strategies import is_folded
from cloud_server.registry import Registry
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.runner import RoundRunner
from cloud_server.secure.desk import MaskedPerformer, MaskingPorts
from wire.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskingRules:
    """What a masked round must survive.

    Attributes:
        dropout: share of a cohort that may vanish at any time.
        colluding: share of a cohort that may tell the cloud all they know.
    """

    dropout: float = 0.2
    colluding: float = 0.1


def masking_rules(policy: str, dropout: float, colluding: float) -> MaskingRules | None:
    """The rules of a policy of secure aggregation; None for `plain`."""
    return None if policy == "plain" else MaskingRules(dropout=dropout, colluding=colluding)


def check_setup(rules: MaskingRules | None, strategy: Any, *, has_app: bool, is_private: bool) -> None:
    """Says at once what does not go with masks.

    Raises:
        ConfigurationError: (operator) a ServerApp, differential privacy, or a strategy that needs single updates.
    """
    if rules is None:
        return
    for is_there, what in ((has_app, "a ServerApp"), (is_private, "noise that the aggregator adds")):
        if is_there:
            raise _excluded(what)
    check_strategy(strategy)


def _excluded(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"secure aggregation does not go with {what}, which needs single updates",
        hint="set run.secure_aggregation = plain, or leave the other out",
    )


def check_strategy(strategy: Any) -> None:
    """Raises `ConfigurationError` when a strategy needs to see single updates."""
    if not is_folded(strategy):
        raise ConfigurationError(
            f"{type(strategy).__name__} looks at single updates, which secure aggregation hides",
            hint="use FedAvg, FedAvgM, FedProx, FedAdam, FedYogi or FedAdagrad with secure_aggregation = pairwise",
        )


def make_runner(
    plan: RunPlan, ports: RunPorts, rules: MaskingRules | None, *, registry: Registry, downlink: Downlink
) -> RoundRunner:
    """The runner of a run.

    Raises:
        ConfigurationError: (operator) a model with buffers, or noise of the aggregator, under masks.
    """
    if rules is None:
        return RoundRunner(plan, ports)
    if ports.budget is not None:
        raise _excluded("noise that the aggregator adds")
    masking = MaskingPorts(
        tenant=downlink.topics.tenant,
        fleet=downlink.topics.fleet,
        dropout=rules.dropout,
        colluding=rules.colluding,
        update_key=lambda device: bytes.fromhex(registry.show(device).update_key),
        send=downlink.send_masking,
    )
    return RoundRunner(plan, ports, make_desk=partial(MaskedPerformer, masking=masking))
