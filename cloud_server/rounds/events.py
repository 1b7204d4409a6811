"""What can happen to a round (events), and what the machine asks its shell to do (actions). Pure, frozen
data."""

from __future__ import annotations

from dataclasses import dataclass

# ---- events: what happened ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by."""


@dataclass(frozen=True, slots=True)
class NodesChanged:
    """The approved devices that are present now.

    Attributes:
        return_seconds: over which the fleet is asked to spread its return after it lost us (`pace.py`).
    """

    present: frozenset[str]
    return_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeReturned:
    """A device that nobody saw leave has connected anew: what was sent to it meanwhile may be lost with its session."""

    device: str


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A device's last will arrived."""

    device: str


@dataclass(frozen=True, slots=True)
class RunPaused:
    """The operator stops or goes on with opening rounds; a round under way ends well."""

    is_paused: bool


@dataclass(frozen=True, slots=True)
class RoundOpened:
    """The round with its orders is committed.

    Attributes:
        carried: who is still at work on an order of an earlier round, in a buffered run.
        answered: whose update is in the buffer already.
    """

    devices: tuple[str, ...]
    deadline: float
    carried: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RoundNotOpened:
    """No cohort could be drawn, or nothing is to be done now."""

    reason: str


@dataclass(frozen=True, slots=True)
class JoinArrived:
    """A device answered its order."""

    device: str
    accepted: bool


@dataclass(frozen=True, slots=True)
class ReplyStored:
    """A member's update (or, in the evaluation, its metrics) was screened and committed."""

    device: str


@dataclass(frozen=True, slots=True)
class MaskAnswered:
    """A member sent what the present phase of a masked round asks it for."""

    device: str


@dataclass(frozen=True, slots=True)
class MaskPhaseOpened:
    """The next phase of a masked round is committed, for these devices."""

    devices: tuple[str, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class MasksKnown:
    """Enough was told to unmask the sum; who has not answered yet is not needed."""


@dataclass(frozen=True, slots=True)
class HelperAnswered:
    """The helper told the sum of the masks (`reason` empty), or never will."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class ReplyRefused:
    """A member's reply was refused; it gets no second one in this collection."""

    device: str


@dataclass(frozen=True, slots=True)
class FoldDone:
    """The fold gave a new head (`reason` empty), or nothing that may be kept."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class EvaluationOpened:
    """The orders of an evaluation, or of an app's exchange, are committed; none is a legal number."""

    devices: tuple[str, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class RunEnded:
    """Whoever drives the run from outside (a ServerApp) has no more to do; or, with a `reason`, the privacy budget is
    spent."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class DecisionMade:
    """The gate has released the head or held it back."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The process started with this state from the database: what was under way is done again."""


EvaluationStored = ReplyStored
Event = (
    Tick
    | NodesChanged
    | NodeReturned
    | NodeLost
    | RunPaused
    | RoundOpened
    | RoundNotOpened
    | JoinArrived
    | ReplyStored
    | ReplyRefused
    | MaskAnswered
    | MaskPhaseOpened
    | MasksKnown
    | HelperAnswered
    | FoldDone
    | EvaluationOpened
    | RunEnded
    | DecisionMade
    | Resumed
)


# ---- actions: what the shell must do, in this order --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenRound:
    """Draw a cohort and commit round and orders; answered by `RoundOpened` or `RoundNotOpened`."""

    round_number: int


@dataclass(frozen=True, slots=True)
class SendOrders:
    """Publish the invitation and send the committed orders of these devices."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResendOrder:
    """Send the same order again."""

    device: str


@dataclass(frozen=True, slots=True)
class CloseCollection:
    """Commit that no further reply counts."""


@dataclass(frozen=True, slots=True)
class CloseKeys:
    """Commit the keys of a masked round; answered by `MaskPhaseOpened` with who shares now."""


@dataclass(frozen=True, slots=True)
class CloseShares:
    """Commit who masks with whom; answered by `MaskPhaseOpened` with who trains."""


@dataclass(frozen=True, slots=True)
class AskForMasks:
    """Ask those whose masked updates are committed what unmasks their sum; answered by `MaskPhaseOpened`."""


@dataclass(frozen=True, slots=True)
class AskHelper:
    """Ask the helper for the sum of the masks of the committed updates; `HelperAnswered` comes when it comes. The same
    question may be asked again."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Aggregate the committed set; answered by `FoldDone`."""


@dataclass(frozen=True, slots=True)
class CommitFold:
    """Commit new head, strategy state and the terminal state of every update together."""

    is_evaluated: bool


@dataclass(frozen=True, slots=True)
class SendEvaluateOrders:
    """Draw and commit the evaluation's orders, then send them; answered by `EvaluationOpened`."""


@dataclass(frozen=True, slots=True)
class Decide:
    """Ask the gate; answered by `DecisionMade`."""


@dataclass(frozen=True, slots=True)
class CommitRound:
    """Commit that the round is done."""


@dataclass(frozen=True, slots=True)
class FailRound:
    """Commit that the round failed: nothing is folded, its updates are discarded."""

    reason: str


@dataclass(frozen=True, slots=True)
class FinishRun:
    """Commit that the run is finished, or why it cannot go on; tell the fleet that it is idle."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Send a `Tick` at this time."""

    at: float


Action = (
    OpenRound
    | SendOrders
    | ResendOrder
    | CloseCollection
    | CloseKeys
    | CloseShares
    | AskForMasks
    | AskHelper
    | Fold
    | CommitFold
    | SendEvaluateOrders
    | Decide
    | CommitRound
    | FailRound
    | FinishRun
    | SetTimer
)
