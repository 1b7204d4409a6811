"""A scenario of a simulated fleet as TOML: data, training, faults, attacks. Every option has a default and a bound.

Example (`docs/reference.md` lists them all):

    [run]
    model = "tiny_transformer"
    strategy = "FedAdam"
    parameters = { eta = 0.01 }
    [faults]
    cuts_per_hour = 60.0
    slow_share = 0.2
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field, structs

from cloud_server.settings import PrivacySettings, TrainSettings
from fleet.attacks import AttackName
from process.settings import load_settings
from wire.errors import ConfigurationError


def _option(sentence: str, **bounds: Any) -> Meta:
    return Meta(description=sentence, **bounds)


class DataScenario(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[data]`: how a data set becomes that of a fleet.

    The smartwatch's devices are virtual people, made of the recordings of the 8 who are not the operator's, or these
    people themselves; images are divided by a Dirichlet distribution of their labels.
    """

    people: Annotated[
        Literal["virtual", "real"],
        _option("Smartwatch: any number of virtual people, or the real 8 with a device on each wrist."),
    ] = "virtual"
    crop: Annotated[
        float,
        _option(
            "Smartwatch: share of a recording that a virtual person keeps, as one piece.", gt=0.05, le=1.0
        ),
    ] = 0.35
    rotation_degrees: Annotated[
        float, _option("Smartwatch: largest rotation of the watch on a virtual wrist.", ge=0.0, le=180.0)
    ] = 15.0
    scale: Annotated[
        float, _option("Smartwatch: largest relative change of the strength of movement.", ge=0.0, lt=1.0)
    ] = 0.15
    alpha: Annotated[
        float,
        _option("Images: concentration of the labels; below 1 most devices see few.", gt=0.0, le=1e6),
    ] = 0.3
    samples: Annotated[int, _option("Fashion-MNIST: images that are divided at most.", ge=1, le=60_000)] = (
        12_000
    )


class RunScenario(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[run]`"""

    model: Annotated[str, _option("Model of the zoo; its data set comes with it.", min_length=1)] = (
        "watch_cnn1d"
    )
    strategy: Annotated[
        str, _option("Strategy, by its class name: Flower's, or a robust rule.", min_length=1)
    ] = "ClippedMean"
    parameters: Annotated[dict[str, Any], _option("Parameters of the strategy's constructor.")] = {}
    quorum_share: Annotated[
        float, _option("Share of the devices that opens and closes a round.", gt=0.0, le=1.0)
    ] = 0.5
    goal_share: Annotated[
        float,
        _option("Share of the devices whose updates close a round at once; 0 for all.", ge=0.0, le=1.0),
    ] = 0.0
    mode: Annotated[
        Literal["sync", "buffered"],
        _option("Whether a round folds updates of its own base only, or the first ones that come."),
    ] = "sync"
    max_staleness: Annotated[
        int, _option("Buffered: heads after which an update is refused.", ge=0, le=1000)
    ] = 10
    staleness_exponent: Annotated[
        float, _option("Buffered: see `run.staleness_exponent` of the aggregator.", ge=0.0, le=10.0)
    ] = 0.5
    deadline_seconds: Annotated[float, _option("Longest wait for updates.", gt=0.0, le=86_400.0)] = 120.0
    evaluate_every: Annotated[int, _option("Rounds between evaluations; 0 for never.", ge=0, le=10**6)] = 5
    max_operator_drop: Annotated[
        float, _option("How much worse a candidate may be on the operator's data.", ge=0.0, le=1.0)
    ] = 0.5


class SecureScenario(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[secure]`: whether updates come under masks (FedAvg and its like only)."""

    policy: Annotated[
        Literal["plain", "pairwise", "two_server"],
        _option("Whether updates come without masks, under those of neighbours, or under those of a helper."),
    ] = "plain"
    dropout: Annotated[
        float,
        _option("Pairwise: share of a cohort that may vanish without failing the round.", ge=0.0, lt=0.5),
    ] = 0.2
    min_devices: Annotated[
        int, _option("Two servers: fewest devices in a sum that the helper tells.", ge=3, le=16_384)
    ] = 3


class FaultScenario(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[faults]`: all drawn from the seed."""

    cuts_per_hour: Annotated[
        float, _option("Mean number of lost connections of one device.", ge=0.0, le=3600.0)
    ] = 0.0
    cut_seconds: Annotated[float, _option("How long a device is away after one.", gt=0.0, le=86_400.0)] = 20.0
    slow_share: Annotated[float, _option("Share of slow devices.", ge=0.0, le=1.0)] = 0.0
    slow_factor: Annotated[float, _option("How much longer their jobs take.", ge=1.0, le=1000.0)] = 10.0
    job_seconds: Annotated[float, _option("Time of a training job on a usual device.", gt=0.0, le=3600.0)] = (
        4.0
    )


class AttackScenario(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[attack]`: devices that falsify what they train; who they are is drawn from the seed."""

    kind: Annotated[
        Literal["none", "sign_flip", "boost", "label_flip", "alie", "ipm", "noise", "backdoor"],
        _option("What attackers do; fleet/attacks.py says what each is."),
    ] = "none"
    attackers: Annotated[float, _option("Share of the devices that attack.", ge=0.0, le=0.9)] = 0.2


class Scenario(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole scenario. Without `[train]`, devices train as suits the model (`fleet/workloads.py`)."""

    data: DataScenario = field(default_factory=DataScenario)
    run: RunScenario = field(default_factory=RunScenario)
    secure: SecureScenario = field(default_factory=SecureScenario)
    train: TrainSettings | None = None
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    faults: FaultScenario = field(default_factory=FaultScenario)
    attack: AttackScenario = field(default_factory=AttackScenario)


def with_model(scenario: Scenario, model: str) -> Scenario:
    """The scenario with another model, and so with its data."""
    return structs.replace(scenario, run=structs.replace(scenario.run, model=model))


def with_attack(scenario: Scenario, kind: AttackName | None, attackers: float | None) -> Scenario:
    """The scenario with another attack, or another share of attackers; None leaves the scenario's own.

    Raises:
        ConfigurationError: (operator) a share of attackers, and nothing for them to do.
    """
    attack = scenario.attack
    if kind is not None:
        attack = structs.replace(attack, kind=kind)
    if attackers is not None:
        if attack.kind == "none":
            raise ConfigurationError("there are attackers, and no attack", hint="say --attack")
        attack = structs.replace(attack, attackers=attackers)
    return structs.replace(scenario, attack=attack)


def load_scenario(path: Path | None) -> Scenario:
    """Reads a scenario; the default one without a file.

    Raises:
        ConfigurationError: (operator) the file is missing, or an option is unknown or out of bounds.
    """
    return load_settings(Scenario, path, None)
