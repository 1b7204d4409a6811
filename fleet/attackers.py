"""Attackers in a simulated fleet: real agents whose updates are falsified after training and before they are sealed.

Laws of the file: the agent does not know of it (what stands behind its worker's seam does); attackers know what
attackers trained and nothing of others; all follows from the seed and virtual time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from edge_agent.ports import JobKind, JobResult, Worker
from fleet.attacks import ATTACKS, POISONS, Known, chosen_attackers, falsified, poisoned
from models.data.federation import Floats, Labels
from wire.codec import decode, encode
from wire.errors import ConfigurationError
from wire.manifest import TaskSpec
from wire.messages import Update

_KEPT_ROUNDS = 2


class Conspiracy:
    """The attackers of one fleet.

    Args:
        attack: one of `ATTACKS`.
        share: of the devices.
        task: of the model.

    Raises:
        ConfigurationError: (operator) no such attack, nobody attacks, or labels are attacked that nobody learns from.
    """

    def __init__(
        self, attack: str, share: float, devices: Iterable[str], task: TaskSpec, *, seed: int
    ) -> None:
        names = list(devices)
        if attack not in ATTACKS:
            raise ConfigurationError(f"no attack is called {attack!r}", hint="one of " + ", ".join(ATTACKS))
        if attack in POISONS and task.kind != "classification":
            raise ConfigurationError(
                f"{attack} attacks labels, and this model learns without",
                hint="choose another attack or model",
            )
        self.attack = attack
        self.attackers = chosen_attackers(names, share, seed)
        self.devices = len(names)
        self._classes = task.classes
        self._seed = seed
        self._trained: dict[tuple[str, int], dict[str, Floats]] = {}

    def training_data(self, device: str, x: Floats, y: Labels) -> tuple[Floats, Labels]:
        """What a device trains on: its own windows, unless it is an attacker that poisons them."""
        if device not in self.attackers:
            return x, y
        return poisoned(self.attack, x, y, self._classes, self._rng(device, "data"))

    def behind(self, device: str, worker: Worker) -> Worker:
        """The device's worker: its own, or one that falsifies what it trains."""
        if device not in self.attackers or self.attack in POISONS:
            return worker
        return _FalsifyingWorker(worker, device, self)

    def note(self, device: str, update: Update) -> None:
        """An attacker has trained; the others know."""
        key = (update.run, update.round_number)
        self._trained.setdefault(key, {})[device] = decode(update.payload, update.codec, update.params_size)
        while len(self._trained) > _KEPT_ROUNDS:
            del self._trained[next(iter(self._trained))]

    def falsify(self, device: str, update: Update) -> Update:
        """What an attacker sends for what it trained."""
        trained = self._trained.get((update.run, update.round_number), {})
        own = decode(update.payload, update.codec, update.params_size)
        known = Known(
            own=own,
            trained=np.stack([trained[name] for name in sorted(trained)] or [own]),
            attackers=len(self.attackers),
            devices=self.devices,
        )
        rng = self._rng(device, update.run, update.round_number)
        return msgspec.structs.replace(
            update, payload=encode(falsified(self.attack, known, rng), update.codec, rng)
        )

    def _rng(self, *names: object) -> np.random.Generator:
        return np.random.default_rng(list(hashlib.sha256(repr((self._seed, *names)).encode()).digest()))


class _FalsifyingWorker:
    """An attacker's worker. What it trained is known to the others at once, and falsified when the job ends."""

    def __init__(self, inner: Worker, device: str, conspiracy: Conspiracy) -> None:
        self._inner = inner
        self._device = device
        self._conspiracy = conspiracy

    def submit(
        self, kind: JobKind, key: bytes, work: Callable[[], Any], done: Callable[[JobResult], None]
    ) -> None:
        if kind != "train":
            self._inner.submit(kind, key, work, done)
            return

        def noted() -> Any:
            update, left_over = work()
            self._conspiracy.note(self._device, update)
            return update, left_over

        def falsified_at_end(result: JobResult) -> None:
            if not result.error:
                update, left_over = result.value
                result = replace(result, value=(self._conspiracy.falsify(self._device, update), left_over))
            done(result)

        self._inner.submit(kind, key, noted, falsified_at_end)

    def stop(self) -> None:
        self._inner.stop()
