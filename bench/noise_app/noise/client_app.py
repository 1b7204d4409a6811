"""The ClientApp: no training at all, so that what is measured is Flower's own work."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers with the arrays plus standard normal noise."""
    rng = np.random.default_rng()
    arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
    noisy = [array + rng.standard_normal(array.shape, dtype=np.float32) for array in arrays]
    content = RecordDict(
        {"arrays": ArrayRecord(noisy), "metrics": MetricRecord({"num-examples": 8, "loss": 1.0})}
    )
    return Message(content, reply_to=message)
