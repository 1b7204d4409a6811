"""Strategies by name, with their parameters from configuration: Flower's and ours.

Twelve of Flower's and our robust ones (`robust.py`) directly, the four wrappers for differential privacy around one of
them; the two for XGBoost merge trees, which is not what devices send here, and are refused with a hint.

Laws of the file: a name or parameter that is unknown is an error that names the nearest one; exact types
decide what a strategy is given (`isinstance` is never asked: median and Krum subclass FedAvg).
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from cloud_server.flower.private import aggregate_metricrecords
from cloud_server.flower.robust import ROBUST, ClippedMean, FLTrust
from wire.errors import ConfigurationError

PLAIN: dict[str, type[Strategy]] = {
    kind.__name__: kind
    for kind in (
        flower.FedAvg,
        flower.FedAvgM,
        flower.FedProx,
        flower.FedAdam,
        flower.FedYogi,
        flower.FedAdagrad,
        flower.FedMedian,
        flower.FedTrimmedAvg,
        flower.Krum,
        flower.MultiKrum,
        flower.Bulyan,
        flower.QFedAvg,
    )
}
WRAPPERS: dict[str, type[Strategy]] = {
    kind.__name__: kind
    for kind in (
        flower.DifferentialPrivacyServerSideFixedClipping,
        flower.DifferentialPrivacyServerSideAdaptiveClipping,
        flower.DifferentialPrivacyClientSideFixedClipping,
        flower.DifferentialPrivacyClientSideAdaptiveClipping,
    )
}
REFUSED = ("FedXgbBagging", "FedXgbCyclic")

# Weighted means, and functions of one: they get all replies folded into one.
_FOLDED = frozenset(
    {
        *(flower.FedAvg, flower.FedAvgM, flower.FedProx, flower.FedAdam, flower.FedYogi, flower.FedAdagrad),
        ClippedMean,  # of one reply it makes that reply: the driver folds for it
    }
)
_ROBUST = frozenset(
    {
        *(flower.FedMedian, flower.FedTrimmedAvg, flower.Krum, flower.MultiKrum, flower.Bulyan),
        *ROBUST.values(),
    }
)
# Functions and record keys are ours to set; an accountant needs a configuration of its own.
_OURS = frozenset(
    {
        "train_metrics_aggr_fn",
        "evaluate_metrics_aggr_fn",
        "selection_rule",
        "weighted_by_key",
        "arrayrecord_key",
        "configrecord_key",
        "strategy",
        "accountant",
        "train_reference",
    }
)
# The round's quorum says how many devices must be there; Flower's own default of two would say it twice.
_DEFAULTS: dict[str, Any] = {
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "train_loss_key": "loss_first",
}


def build_strategy(name: str, parameters: Mapping[str, Any] | None = None) -> Strategy:
    """Makes a strategy.

    Args:
        name: of its class, such as `FedAdam` or `ClippedMean`.
        parameters: of its constructor. A wrapper takes one more, `strategy`: a table with the `name` and the
            `parameters` of what it wraps (FedAvg if absent).

    Raises:
        ConfigurationError: (operator) unknown name or parameter, or a value that the strategy refuses.
    """
    given = dict(parameters or {})
    if name in WRAPPERS:
        inner = given.pop("strategy", {"name": "FedAvg"})
        return _construct(WRAPPERS[name], name, given, strategy=_inner_strategy(name, inner))
    if name in PLAIN or name in ROBUST:
        return _construct(PLAIN.get(name) or ROBUST[name], name, given)
    if name in REFUSED:
        raise ConfigurationError(
            f"{name} merges decision trees, devices send updates of a parameter vector",
            hint="use FedAvg or another strategy for neural networks",
            name=name,
        )
    raise ConfigurationError(
        f"no strategy is called {name!r}", hint=_nearest(name, [*ROBUST, *PLAIN, *WRAPPERS]), name=name
    )


def _inner_strategy(wrapper: str, inner: Any) -> Strategy:
    if not isinstance(inner, Mapping) or not set(inner) <= {"name", "parameters"}:
        raise ConfigurationError(
            f"{wrapper}: strategy is not a table of name and parameters",
            hint='write strategy = { name = "FedAvg", parameters = { … } }',
        )
    name = inner.get("name", "FedAvg")
    if name in WRAPPERS:
        raise ConfigurationError(
            f"{wrapper} cannot wrap {name}", hint="wrap one of " + ", ".join([*PLAIN, *ROBUST])
        )
    return build_strategy(name, inner.get("parameters"))


def _construct(kind: type[Strategy], name: str, given: dict[str, Any], **ours: Any) -> Strategy:
    signature = _parameters(kind)
    allowed = [key for key in signature if key not in _OURS]
    for key, value in given.items():
        if key not in allowed:
            raise ConfigurationError(f"{name} has no parameter {key!r}", hint=_nearest(key, allowed), key=key)
        _check_value(name, key, value, str(signature[key].annotation))
    missing = [k for k in allowed if signature[k].default is inspect.Parameter.empty and k not in given]
    if missing:
        raise ConfigurationError(
            f"{name} needs {', '.join(missing)}", hint="set its parameters", missing=missing
        )
    defaults = {key: value for key, value in _DEFAULTS.items() if key in allowed}
    try:
        return kind(**{**defaults, **given, **ours})
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error}", hint="see Flower's documentation of it") from error


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Of a constructor, and of those that it hands the rest to."""
    found: dict[str, inspect.Parameter] = {}
    for each in kind.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = inspect.signature(each.__init__).parameters  # type: ignore[misc]
        for key, parameter in parameters.items():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and key != "self":
                found.setdefault(key, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def _check_value(name: str, key: str, value: Any, annotation: str) -> None:
    """Flower takes anything here and fails rounds later."""
    wanted = annotation.removeprefix("<class '").removesuffix("'>")
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if wanted.startswith("float"):
        is_sound = is_number or (value is None and "None" in wanted)
    elif wanted.startswith("int"):
        is_sound = is_number and isinstance(value, int)
    else:
        is_sound = isinstance(value, str)
    if not is_sound:
        raise ConfigurationError(f"{name}: {key} is {value!r}", hint=f"{key} is of type {wanted}", key=key)


def _nearest(word: str, words: list[str]) -> str:
    by_lower = {each.lower(): each for each in words}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"did you mean {by_lower[close[0]]}?" if close else "one of " + ", ".join(words)


# ---- what a strategy is ------------------------------------------------------------------------------------


def innermost(strategy: Any) -> Any:
    """The strategy inside a wrapper, or itself (untyped: `Strategy` declares no attribute of those that all
    have)."""
    return strategy.strategy if type(strategy) in WRAPPERS.values() else strategy


def is_differentially_private(strategy: Strategy) -> bool:
    return type(strategy) in WRAPPERS.values()


def is_client_adaptive(strategy: Strategy) -> bool:
    """Whether it adapts the clipping norm to what share of the devices clipped."""
    return type(strategy) is flower.DifferentialPrivacyClientSideAdaptiveClipping


def clipping(strategy: Strategy) -> ClippedMean | None:
    """The strategy itself where it is our default, which folds the updates behind their senders."""
    return strategy if type(strategy) is ClippedMean else None


def check_quorum(strategy: Strategy, quorum: int) -> None:
    """Says at once that rounds would close with fewer replies than the strategy can use, and train nothing.

    Raises:
        ConfigurationError: (operator) Bulyan needs 4f + 3 replies against f false ones.
    """
    inner = innermost(strategy)
    if type(inner) is flower.Bulyan and quorum < (least := 4 * inner.num_malicious_nodes + 3):
        raise ConfigurationError(
            f"Bulyan with num_malicious_nodes = {inner.num_malicious_nodes} needs {least} replies,"
            f" and rounds close with {quorum}",
            hint=f"set run.quorum to {least} or more",
        )


def needs_reference(strategy: Strategy) -> bool:
    """Whether it needs an update from the operator's own samples."""
    return type(innermost(strategy)) is FLTrust


def is_robust(strategy: Strategy) -> bool:
    """Whether it bounds what a minority of false replies can do."""
    return type(strategy) in _ROBUST


def is_folded(strategy: Any) -> bool:
    """Whether one reply, the exact weighted mean of all, gives the same as all of them."""
    return bool(
        type(strategy) in _FOLDED
        and strategy.train_metrics_aggr_fn is aggregate_metricrecords
        and strategy.weighted_by_key == "num-examples"
    )


def needed_nodes(strategy: Strategy, kind: str, present: int) -> int:
    """How many nodes `configure_train` or `configure_evaluate` waits for.

    Args:
        kind: `train` or `evaluate`.
        present: how many are there.
    """
    inner = innermost(strategy)
    fraction = getattr(inner, f"fraction_{kind}")
    if fraction == 0.0:
        return 0
    return int(max(inner.min_available_nodes, getattr(inner, f"min_{kind}_nodes"), int(present * fraction)))
