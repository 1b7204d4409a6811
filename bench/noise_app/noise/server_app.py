"""The ServerApp: FedAvg over all nodes, which writes down when each round began and ended."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class MarkedFedAvg(FedAvg):
    """FedAvg that appends a JSON line for each beginning and end of a round."""

    def __init__(self, marks: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._marks = marks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._mark("begin", server_round, len(messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        received = list(replies)
        result = super().aggregate_train(server_round, received)
        sound = sum(not reply.has_error() for reply in received)
        self._mark("end", server_round, sound)
        return result

    def _mark(self, what: str, server_round: int, messages: int) -> None:
        line = {"what": what, "round": server_round, "messages": messages, "time": time.time()}
        with self._marks.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds of the run's configuration on `params` float32 values in `tensors` arrays."""
    config = context.run_config
    nodes, size, tensors = (int(str(config[key])) for key in ("num-nodes", "params", "tensors"))
    rng = np.random.default_rng(0)
    arrays = np.array_split(rng.standard_normal(size, dtype=np.float32), tensors)
    strategy = MarkedFedAvg(
        Path(str(config["marks"])),
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=nodes,
        min_available_nodes=nodes,
    )
    strategy.start(grid, ArrayRecord(arrays), num_rounds=int(str(config["num-server-rounds"])), timeout=600.0)
