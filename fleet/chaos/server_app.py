"""What a user of Flower would write: its own averaging loop as a ServerApp, which knows nothing of us or of faults.

Law of the file: nothing of ours decides anything in it; it is the one program of a user's in this tree.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from wire.checkpoint import Checkpoint
from wire.manifest import Manifest

FEWEST = 2
_ROUNDS = 1_000_000
"""More than any history has."""


def averaging_app(manifest: Manifest, start: Checkpoint) -> ServerApp:
    """Flower's loop around its own FedAvg, from a checkpoint on, without end."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(
            {
                slot.name: Array(start.params[slot.offset : slot.offset + slot.size].reshape(slot.shape))
                for slot in manifest.params
            }
        )
        strategy = FedAvg(min_train_nodes=FEWEST, min_evaluate_nodes=FEWEST, min_available_nodes=FEWEST)
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=_ROUNDS)

    return app
