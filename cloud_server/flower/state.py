"""What Flower's strategies carry from round to round, taken out and put back by name.

Laws of the file: explicit attributes of exact types, no pickle; a run whose state goes out and in after
every round gives the same parameters bit for bit. `current_arrays` is not state here: it is the round's
base, and set from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from cloud_server.aggregate.answers import Trace
from cloud_server.flower.records import as_named
from cloud_server.flower.robust import ROBUST, ClippedMean, FLTrust
from cloud_server.flower.strategies import WRAPPERS, innermost
from wire.cbor import decode_canonical, encode_canonical
from wire.errors import MessageError, StorageError

MAX_STATE_BYTES = 2**30
_DTYPES = {"<f4", "<f8", "<u8"}
_MOMENTS = ("m_t", "v_t")
_OPTIMIZERS = frozenset({flower.FedAdam, flower.FedYogi, flower.FedAdagrad})
_STANDING = frozenset({ClippedMean, FLTrust})
_ADAPTIVE = frozenset(
    {
        flower.DifferentialPrivacyServerSideAdaptiveClipping,
        flower.DifferentialPrivacyClientSideAdaptiveClipping,
    }
)
_Arrays = dict[str, NDArray[Any]]


def set_base(strategy: Any, base: ArrayRecord) -> None:
    """Gives the strategy the parameters that this round's replies started from.

    `configure_train` does the same, but perhaps in a process that has ended since. FedAvgM would keep its
    own last result instead; that is the base too, unless the head was refined after the fold.
    """
    inner = innermost(strategy)
    if type(inner) in _OPTIMIZERS:
        inner.current_arrays = as_named(base)
    elif type(inner) is flower.FedAvgM or type(inner) in ROBUST.values():
        inner.current_arrays = base
    elif type(inner) is flower.QFedAvg:
        inner.current_arrays = base.copy()
    if type(strategy) in WRAPPERS.values() and hasattr(strategy, "current_arrays"):
        strategy.current_arrays = base


def export_state(strategy: Any) -> dict[str, bytes]:
    """The state by name, as canonical CBOR; empty for a strategy that has none (yet)."""
    inner = innermost(strategy)
    state: dict[str, bytes] = {}
    if type(inner) in _OPTIMIZERS:
        for name in _MOMENTS:
            moments = getattr(inner, name)
            if moments is not None:
                state[name] = _pack(moments)
    elif type(inner) is flower.FedAvgM and inner.momentum_vector is not None:
        state["momentum_vector"] = _pack({str(i): each for i, each in enumerate(inner.momentum_vector)})
    elif type(inner) in _STANDING and inner.way is not None:
        state["way"] = _pack({"": inner.way})
        state["standings"] = _pack(
            {
                "nodes": np.array(list(inner.standings), dtype=np.uint64),
                "standings": np.array(list(inner.standings.values()), dtype=np.float64),
            }
        )
        state["traces"] = _pack(_as_arrays(inner.traces))
    if type(strategy) in _ADAPTIVE:
        state["clipping_norm"] = _pack({"": np.asarray(strategy.clipping_norm, dtype=np.float64)})
    return state


def import_state(strategy: Any, state: Mapping[str, bytes]) -> None:
    """Puts back what `export_state` gave; a name that is absent goes back to nothing.

    Raises:
        StorageError: (disk) not a state of this strategy.
    """
    inner = innermost(strategy)
    left = dict(state)
    if type(inner) in _OPTIMIZERS:
        for name in _MOMENTS:
            setattr(inner, name, _unpack(left.pop(name)) if name in left else None)
    elif type(inner) is flower.FedAvgM:
        packed = left.pop("momentum_vector", None)
        inner.momentum_vector = None if packed is None else list(_unpack(packed).values())
    elif type(inner) in _STANDING:
        way, standings, traces = (left.pop(name, None) for name in ("way", "standings", "traces"))
        inner.way = None if way is None else _unpack(way)[""]
        inner.standings = {} if standings is None else _standings(_unpack(standings))
        inner.traces = {} if traces is None else _traces(_unpack(traces))
    if type(strategy) in _ADAPTIVE:
        if "clipping_norm" not in left:
            raise StorageError("the state of adaptive clipping has no clipping norm")
        strategy.clipping_norm = float(_unpack(left.pop("clipping_norm"))[""])
    if left:
        raise StorageError(
            f"{type(strategy).__name__} has no state called {', '.join(sorted(left))}",
            hint="the run began with another strategy: give the new one a new run",
        )


def _pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    return encode_canonical(
        [
            [
                name,
                values.dtype.newbyteorder("<").str,
                list(values.shape),
                np.ascontiguousarray(values).tobytes(),
            ]
            for name, values in arrays.items()
        ]
    )


def _unpack(data: bytes) -> _Arrays:
    try:
        rows = decode_canonical(data, limit_bytes=MAX_STATE_BYTES)
        return {name: _array(dtype, shape, values) for name, dtype, shape, values in rows}
    except (MessageError, TypeError, ValueError) as error:
        raise StorageError(f"damaged strategy state: {error}") from error


def _standings(arrays: _Arrays) -> dict[int, float]:
    return dict(zip(arrays["nodes"].tolist(), arrays["standings"].tolist(), strict=True))


def _as_arrays(traces: Mapping[int, Trace]) -> _Arrays:
    """Traces side by side, as `_traces` takes them apart."""
    rows = [each.row for each in traces.values()]
    return {
        "nodes": np.array(list(traces), dtype=np.uint64),
        "headings": np.array([each.heading for each in traces.values()], dtype=np.float64),
        "own": np.array([each.own for each in traces.values()], dtype=np.float64),
        "rows": np.stack(rows) if rows else np.empty((0, 0), dtype=np.float32),
    }


def _traces(arrays: _Arrays) -> dict[int, Trace]:
    columns = (arrays[name].tolist() for name in ("nodes", "headings", "own"))
    return {
        node: Trace(heading, own, row)
        for node, heading, own, row in zip(*columns, arrays["rows"], strict=True)
    }


def _array(dtype: str, shape: list[int], values: bytes) -> NDArray[Any]:
    if dtype not in _DTYPES:
        raise ValueError(f"no array of type {dtype!r} belongs to a strategy")
    return np.frombuffer(values, dtype=dtype).reshape(shape).copy()
