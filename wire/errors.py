"""Every error that Shoal raises on purpose, one branch per culprit.

ShoalError
├── ConfigurationError        the operator: a command, setting, file or argument is wrong
│   └── MissingExtraError     an optional part of the distribution is not installed
├── PeerError                 the other side: what it sent cannot be used
│   ├── MessageError          bytes that are not a message of ours (one error for all reasons)
│   │   └── EnvelopeError     a sealed or signed message that does not open (says nothing more to a peer)
│   ├── ReplayError           a (device, epoch, seq) that was seen, or is behind the window
│   ├── ChunkError            a chunk without a granted slot, out of bounds or with a wrong hash
│   ├── RefusedError          the peer said no: it names its reason
│   └── UpdateError           an update that opened but cannot be folded
├── TransportError            the network or the broker
│   ├── BackpressureError     our queue or the in-flight window is full: try again after a PUBACK
│   ├── OversizeError         a packet above what the broker accepts
│   └── BrokerError           no broker can be started, or it does not answer its probe
├── TrustError                signatures, certificates, release metadata, tokens
│   ├── EnrolmentError        a token that is used, expired, foreign or has a wrong pin
│   └── ReleaseError          release metadata or a target that does not verify
├── ModelError                a model, its graphs, shapes or data
│   ├── UnsupportedLayerError a layer that has no training graph: names it and the substitute
│   ├── BundleError           a bundle whose files do not agree with its manifest
│   ├── SelfTestError         a model that loads or answers wrongly in the child process
│   └── DataError             a data set, window or label that does not fit the task
├── RoundError                a federated round that cannot start or end well
│   ├── QuorumError           fewer devices than the round needs
│   └── BudgetError           a round that would cross the privacy budget
└── StorageError              disk: full, damaged or not ours

Errors carry facts as attributes and, where a person can do something, a `hint`.
"""

from __future__ import annotations

from typing import Any


class ShoalError(Exception):
    """Root of all errors raised on purpose.

    Args:
        message: what happened and where, one sentence without a final period.
        hint: what the reader can do about it, or empty.
        **facts: values behind the message (sizes, names, limits), kept as attributes.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.hint = hint
        self.facts = facts
        for name, value in facts.items():
            setattr(self, name, value)


class ConfigurationError(ShoalError):
    """The operator gave a command, setting, file or argument that cannot be used."""

    exit_code = 2


class MissingExtraError(ConfigurationError):
    """An optional part of the distribution is not installed."""


class PeerError(ShoalError):
    """What the other side sent cannot be used."""

    exit_code = 3


class MessageError(PeerError):
    """Bytes that are not a message of ours."""


class EnvelopeError(MessageError):
    """A sealed or signed message that does not open; `reason` (one word) is for our logs only."""

    reason: str = ""


class ReplayError(PeerError):
    """A (device, epoch, seq) that was seen before or lies behind the window (`reason`: seen, behind)."""

    reason: str = ""


class ChunkError(PeerError):
    """A chunk without a granted slot, out of bounds, or with a wrong hash."""


class RefusedError(PeerError):
    """The peer refused a request and named its reason."""


class UpdateError(PeerError):
    """An update that opened but cannot be folded (shape, base, value, weight)."""


class TransportError(ShoalError):
    """The network or the broker failed."""

    exit_code = 4


class BackpressureError(TransportError):
    """A queue or window is full; publish again after an acknowledgement."""


class OversizeError(TransportError):
    """A packet is larger than the broker accepts (`size_bytes`, `limit_bytes`)."""


class BrokerError(TransportError):
    """No broker can be started, or it does not answer its probe."""


class TrustError(ShoalError):
    """A signature, certificate, token or release metadata does not verify."""

    exit_code = 5


class EnrolmentError(TrustError):
    """An enrolment token is used, expired, foreign or has a wrong pin, or the name is taken."""


class ReleaseError(TrustError):
    """Release metadata or a release's file does not verify."""


class ModelError(ShoalError):
    """A model, its graphs, shapes or data cannot be used."""

    exit_code = 6


class UnsupportedLayerError(ModelError):
    """A layer for which no training graph can be exported (`layer`, `substitute`)."""


class BundleError(ModelError):
    """A bundle's files do not agree with its manifest."""


class SelfTestError(ModelError):
    """A model failed to load or to reproduce its golden outputs in the child process."""


class DataError(ModelError):
    """A data set, window or label does not fit the task."""


class RoundError(ShoalError):
    """A federated round cannot start or cannot end well."""

    exit_code = 7


class QuorumError(RoundError):
    """Fewer devices are present than the round needs (`present`, `needed`)."""


class BudgetError(RoundError):
    """A round would cross the privacy budget (`epsilon`, `limit`)."""


class StorageError(ShoalError):
    """The disk is full, damaged, or holds something that is not ours."""

    exit_code = 8
