"""Runs a stock Flower ServerApp: `--serverapp module:app`, in a thread of its own, over our grid.

Laws of the file: the user's folder is appended to `sys.path`, never put in front (his package may be called
`models`); the app is a plain callable `app(grid, context)`; whatever it raises ends the app and not the service; the
global generators are seeded before it begins, so that an app which seeds none still does the same after a restart.
"""

from __future__ import annotations

import importlib
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp as ServerApp

from cloud_server.db.grid_steps import GridStep, insert_step
from cloud_server.flower.exchange import Board
from cloud_server.flower.exchange_desk import ExchangeDesk
from cloud_server.flower.grid import ShoalGrid
from cloud_server.flower.private import RUN_ID, SERVER_NODE_ID
from cloud_server.flower.tape import Tape
from cloud_server.rounds.draws import draw_seed
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.runner import RoundRunner
from process.logs import get_logger
from wire.errors import ConfigurationError, RoundError, ShoalError

_log = get_logger("cloud.serverapp")
_NEVER = 10**9
Config = Mapping[str, bool | int | float | str]
Spawn = Callable[[Callable[[], None]], threading.Thread]


def load_server_app(spec: str, folder: Path) -> ServerApp:
    """Imports an app.

    Args:
        spec: `module:attribute`, such as `myproject.server_app:app`.
        folder: appended to `sys.path`.

    Raises:
        ConfigurationError: (operator) not such a name, no such module or attribute, or not a ServerApp.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigurationError(
            f"{spec!r} names no app", hint="write module:attribute, such as server_app:app"
        )
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the module {error.name} of {spec} is not there",
            hint=f"{folder} was searched after our own path",
        ) from error
    except Exception as error:  # a user's module may raise anything when it is run
        raise ConfigurationError(
            f"the module {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    app = getattr(module, attribute, None)
    if not isinstance(app, ServerApp):
        raise ConfigurationError(
            f"{spec} is not a Flower ServerApp", hint="app = ServerApp(), with a function under @app.main()"
        )
    return app


def start_thread(work: Callable[[], None]) -> threading.Thread:
    """Starts an app's thread."""
    # A daemon: the service must be able to stop while an app computes.
    thread = threading.Thread(target=work, name="serverapp", daemon=True)
    thread.start()
    return thread


class ServerAppThread:
    """The app in its thread. `board` tells the other side how it ended."""

    def __init__(
        self,
        app: ServerApp,
        board: Board,
        tape: Tape,
        config: Config,
        *,
        quorum: int,
        seconds: float,
        spawn: Spawn,
    ) -> None:
        self._app = app
        self._board = board
        self._tape = tape
        self._config = config
        self._quorum = quorum
        self._seconds = seconds
        self._spawn = spawn
        self._thread: threading.Thread | None = None

    def start(self, seed: int) -> None:
        """Starts the app from its beginning.

        Raises:
            StorageError: its beginning cannot be put down.
        """
        seed = self._tape.begin(seed)
        grid = ShoalGrid(
            self._board, self._tape, seed=seed, quorum=self._quorum, quorum_seconds=self._seconds
        )
        self._thread = self._spawn(partial(self._run, grid, seed))

    def join(self, seconds: float) -> bool:
        """Waits for the thread; says whether it has ended."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, grid: ShoalGrid, seed: int) -> None:
        context = Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), dict(self._config))
        error: ShoalError | None = None
        try:
            seed_generators(draw_seed(seed, "serverapp"))
            self._app(grid, context)
            self._tape.check_end()
        except ShoalError as raised:
            error = raised
        except Exception as raised:  # noqa: BLE001  the outermost loop of the user's program
            _log.exception("serverapp_raised")
            error = RoundError(f"the ServerApp raised {type(raised).__name__}: {raised}")
            error.__cause__ = raised
        self._board.end(error)


def seed_generators(seed: int) -> None:
    """Seeds what an app that knows nothing of restarts draws its first model and its cohorts from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not imported here: an app that draws from torch has imported it.
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)


def make_serverapp_runner(
    plan: RunPlan,
    ports: RunPorts,
    app: ServerApp,
    *,
    config: Config | None = None,
    quorum_seconds: float = 600.0,
    wake: Callable[[], None] = lambda: None,
    make_board: Callable[[Callable[[], None]], Board] = Board,
    spawn: Spawn = start_thread,
) -> tuple[RoundRunner, Callable[[], None]]:
    """A runner whose rounds are what the app asks for; `resume` starts the app.

    Args:
        ports: `strategy` only weighs the metrics of evaluations here: FedAvg will do.
        config: the app's `context.run_config`.
        quorum_seconds: the app is stopped when fewer than `plan.policy.quorum` nodes were there for so long.
        wake: called from the app's thread when the runner's `tick` has something to do.
        make_board, spawn: what the two threads meet at, and what starts the app's; a simulation gives its own.

    Returns:
        The runner, and what stops the app: to be called when the service stops.
    """
    board = make_board(wake)
    policy = plan.policy

    def keep(step: GridStep) -> None:
        with ports.database.transaction(fence=ports.fence) as connection:
            insert_step(connection, plan.run, step, ports.clock.now())

    tape = Tape(keep, patience_seconds=quorum_seconds, monotonic=time.monotonic)
    thread = ServerAppThread(
        app, board, tape, config or {}, quorum=policy.quorum, seconds=quorum_seconds, spawn=spawn
    )
    # The machine opens no round by itself, and a deadline may be that of the longer collection.
    seconds = {"train": policy.round_seconds, "evaluate": policy.evaluate_seconds}
    driven = replace(policy, quorum=_NEVER, goal=0, rounds=0, evaluate_seconds=max(seconds.values()))
    desk: Any = partial(ExchangeDesk, board=board, tape=tape, start=thread.start, seconds=seconds)
    runner = RoundRunner(replace(plan, policy=driven), ports, make_desk=desk)
    return runner, board.close
