"""From a run's settings to a runner with or without masks.

Law of the file: what does not go with masks is a ConfigurationError before anything runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from cloud_server.deployment import Deployment
from cloud_server.downlink import Downlink
from cloud_server.flower.strategies import is_folded
from cloud_server.privacy.budget import CENTRAL
from cloud_server.registry import Registry
from cloud_server.rounds.buffered import BufferedPerformer
from cloud_server.rounds.performer import Performer
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.runner import RoundRunner
from cloud_server.rounds.state import SecurePolicy
from cloud_server.secure.desk import MaskedPerformer, MaskingPorts
from cloud_server.secure.helped import HelpedPerformer, HelpedPorts
from cloud_server.secure.helper_client import AskedHelper, HttpsHelper
from wire.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskingRules:
    """How updates come under masks, and what a round must survive.

    Attributes:
        policy: `pairwise` or `two_server`.
        dropout: share of a cohort that may vanish at any time (pairwise, or where devices add noise).
        colluding: share of a cohort that may tell the cloud all they know (the same).
        wait_seconds: longest wait for each step beside the updates.
    """

    policy: SecurePolicy = "pairwise"
    dropout: float = 0.2
    colluding: float = 0.1
    wait_seconds: float = 60.0


def masking_rules(
    policy: SecurePolicy, dropout: float, colluding: float, wait_seconds: float = 60.0
) -> MaskingRules | None:
    """The rules of a policy of secure aggregation; None for `plain`."""
    if policy == "plain":
        return None
    return MaskingRules(policy=policy, dropout=dropout, colluding=colluding, wait_seconds=wait_seconds)


def open_helper(deployment: Deployment) -> AskedHelper | None:
    """The helper that the settings name; None under another policy.

    Raises:
        ConfigurationError: (operator) there is none, or its files or address cannot be used.
    """
    settings = deployment.settings
    if settings.secure.policy != "two_server":
        return None
    if not settings.secure.helper_url:
        raise ConfigurationError(
            "secure.policy = two_server needs a helper", hint="name its address in secure.helper_url"
        )
    folder = deployment.folder.root / settings.secure.helper_folder
    return HttpsHelper(settings.secure.helper_url, folder, tenant=settings.tenant, fleet=settings.fleet)


def check_setup(rules: MaskingRules | None, strategy: Any, *, has_app: bool, is_central: bool) -> None:
    """Says at once what does not go with masks.

    Args:
        is_central: the aggregator adds noise to updates, which it must see.

    Raises:
        ConfigurationError: (operator) a ServerApp, central privacy, or a strategy that needs single updates.
    """
    if rules is None:
        return
    for is_there, what in ((has_app, "a ServerApp"), (is_central, "noise that the aggregator adds")):
        if is_there:
            raise _excluded(what)
    check_strategy(strategy)


def _excluded(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"secure aggregation does not go with {what}, which needs single updates",
        hint="set secure.policy = plain, or leave the other out",
    )


def check_strategy(strategy: Any) -> None:
    """Raises `ConfigurationError` when a strategy needs to see single updates."""
    if not is_folded(strategy):
        raise ConfigurationError(
            f"{type(strategy).__name__} looks at single updates, which secure aggregation hides",
            hint="use FedAvg, FedAvgM, FedProx, FedAdam, FedYogi or FedAdagrad, or secure.policy = plain",
        )


def make_runner(
    plan: RunPlan,
    ports: RunPorts,
    rules: MaskingRules | None,
    *,
    registry: Registry,
    downlink: Downlink,
    helper: AskedHelper | None = None,
) -> RoundRunner:
    """The runner of a run.

    Args:
        helper: of a run with two servers.

    Raises:
        ConfigurationError: (operator) a model with buffers, or noise of the aggregator, under masks; or no helper.
    """
    if rules is None:
        return RoundRunner(plan, ports, make_desk=BufferedPerformer if plan.policy.is_buffered else Performer)
    if ports.budget is not None and ports.budget.plan.mode == CENTRAL:
        raise _excluded("noise that the aggregator adds")
    if rules.policy == "two_server":
        if helper is None:
            raise ConfigurationError(
                "secure.policy = two_server needs a helper", hint="set secure.helper_url"
            )
        helped = HelpedPorts(
            tenant=downlink.topics.tenant,
            fleet=downlink.topics.fleet,
            helper=helper,
            dropout=rules.dropout,
            colluding=rules.colluding,
        )
        return RoundRunner(plan, ports, make_desk=partial(HelpedPerformer, helped=helped))
    masking = MaskingPorts(
        tenant=downlink.topics.tenant,
        fleet=downlink.topics.fleet,
        dropout=rules.dropout,
        colluding=rules.colluding,
        update_key=lambda device: bytes.fromhex(registry.show(device).update_key),
        send=downlink.send_masking,
    )
    return RoundRunner(plan, ports, make_desk=partial(MaskedPerformer, masking=masking))
