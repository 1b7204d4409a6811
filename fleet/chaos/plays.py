"""What sort of run a history plays: by its seed, so that a campaign plays all of them in turn.

Laws of the file: a play names everything that its aggregator and its ledger must know alike, and which points of
`faults.POINTS` its histories pass. Source: docs/how-to/chaos.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cloud_server.assembly import RunConfig
from cloud_server.privacy.budget import PrivateRun
from cloud_server.privacy.plan import PrivacyMode, PrivacyPlan
from cloud_server.release.gate import GatePolicy
from cloud_server.rounds.state import RoundMode, RoundPolicy, SecurePolicy
from cloud_server.secure.opening import MaskingRules
from fleet.chaos.faults import POINTS, Fault, make_schedule
from wire.messages import TrainConfig

ROUND_SECONDS = 30.0
MASK_SECONDS = 20.0
GOAL = 3
MAX_STALENESS = 3
STALENESS_EXPONENT = 0.5
"""Of buffered rounds: so few heads that a slow device's update is refused now and then."""
_MASKED_ONLY = tuple(point for point in POINTS if point.endswith(".mask"))
_HELPED_ONLY = ("helper.ask",)
_PRIVATE_ONLY = ("cloud.commit.charge",)
_APP_ONLY = ("cloud.commit.step",)


@dataclass(frozen=True, slots=True)
class Play:
    """A sort of run.

    Attributes:
        momentum: of the server.
        masks: what updates come under.
        noise: who adds it; None for nobody.
        has_app: a stock Flower ServerApp drives the rounds.
        mode: whether a round folds what was trained on its own base, or what comes first.
    """

    name: str
    strategy: str = "FedAvg"
    momentum: float = 0.0
    masks: SecurePolicy = "plain"
    noise: PrivacyMode | None = None
    mode: RoundMode = "sync"
    has_app: bool = False

    @property
    def rare(self) -> tuple[str, ...]:
        """The points that histories of other plays do not pass."""
        if self.has_app:
            return _APP_ONLY
        masked = {"pairwise": _MASKED_ONLY, "two_server": _HELPED_ONLY}.get(self.masks, ())
        return masked if self.noise is None else (*masked, *_PRIVATE_ONLY)

    @property
    def points(self) -> tuple[str, ...]:
        """All points that its histories pass, the rare ones first."""
        left_out = {*_MASKED_ONLY, *_HELPED_ONLY, *_PRIVATE_ONLY, *_APP_ONLY}
        if self.noise is not None:
            # Nobody is asked how good a model is, and the commit that opens a round is the one that charges it.
            left_out |= {"device.job.evaluate", "cloud.commit.open"}
        return (*self.rare, *(point for point in POINTS if point not in left_out))

    @property
    def is_buffered(self) -> bool:
        """Whether an update outlives its round."""
        return self.mode == "buffered"

    @property
    def privacy(self) -> PrivacyPlan | None:
        """What the run promises. So little noise that heads still learn, so large an epsilon that no history spends
        it: how much it is, is for the accountant's tests."""
        if self.noise is None:
            return None
        rate = 0.9 if self.noise == "central" else 1.0
        return PrivacyPlan(
            mode=self.noise, clipping_norm=1.0, noise_multiplier=0.05, sampling_rate=rate, epsilon=1e6
        )

    def config(self, make_private: Callable[[PrivacyPlan], PrivateRun]) -> RunConfig:
        """Short rounds of a run without end; every fifth head is judged and may be released."""
        plan = self.privacy
        return RunConfig(
            run="chaos",
            strategy=self.strategy,
            strategy_parameters={"server_momentum": self.momentum} if self.momentum else {},
            policy=RoundPolicy(
                quorum=2,
                goal=GOAL if self.is_buffered else 0,
                mode=self.mode,
                max_staleness=MAX_STALENESS,
                staleness_exponent=STALENESS_EXPONENT,
                round_seconds=ROUND_SECONDS,
                evaluate_seconds=20.0,
                resend_seconds=5.0,
                evaluate_every=5,
                backoff_max_seconds=30.0,
            ),
            train=TrainConfig(epochs=1, batch_size=8, learning_rate=0.05),
            gate=GatePolicy(max_operator_drop=1.0),
            masking=self._masking,
            privacy=make_private(plan) if plan is not None else None,
        )

    @property
    def _masking(self) -> MaskingRules | None:
        if self.masks == "plain":
            return None
        return MaskingRules(policy=self.masks, dropout=0.3, colluding=0.0, wait_seconds=MASK_SECONDS)


PLAYS = (
    Play("averaged"),
    Play("clipped", strategy="ClippedMean"),
    Play("masked", masks="pairwise"),
    Play("momentum", strategy="FedAvgM", momentum=0.5),
    Play("private", noise="central"),
    Play("noised", masks="pairwise", noise="distributed"),
    Play("helped", masks="two_server"),
    Play("buffered", mode="buffered"),
    Play("app", has_app=True),
)


def schedule_of(seed: int, faults: int) -> tuple[Fault, ...]:
    """The faults of a seed, at points that its history passes."""
    play = play_of(seed)
    return make_schedule(seed, faults, play.points, place=seed // len(PLAYS), rare=len(play.rare))


def play_of(seed: int) -> Play:
    """What the history of a seed plays."""
    return PLAYS[seed % len(PLAYS)]


def play_named(name: str) -> Play:
    """A play by its name: what a kept history played, however many plays there are by now.

    Raises:
        KeyError: there is none.
    """
    return {play.name: play for play in PLAYS}[name]
