"""`python bench/bare_training.py FOLDER ROUNDS`: the train step of a bundle with Python, numpy and onnxruntime alone.

What an agent's memory while it trains is compared with. Prints the peak RSS of this process as JSON. Law of the file:
nothing of ours is imported, and the session is opened as the agent opens it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

STEPS_PER_RUN = 64


def train(graph: bytes, feeds: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Runs every step of the plan in `feeds` (`index` int64 [K, B], `weights` float32 [K, B]), `rounds` times.

    Returns:
        What was fed last, with the parameters that came out; every round begins from those of `feeds`.
    """
    state: dict[str, Any] = {}
    for _ in range(rounds):
        session = _open(graph)
        inputs = {node.name for node in session.get_inputs()}
        outputs = [node.name for node in session.get_outputs()]
        state = {name: feeds[name] for name in inputs}
        for start in range(0, len(feeds["index"]), STEPS_PER_RUN):
            part = slice(start, start + STEPS_PER_RUN)
            state |= {"index": feeds["index"][part], "weights": feeds["weights"][part]}
            answers = dict(zip(outputs, session.run(outputs, state), strict=True))
            carried = {name.removesuffix("_out"): value for name, value in answers.items()}
            state |= {name: value for name, value in carried.items() if name in inputs}
    return state


def _open(graph: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _peak_kib() -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    folder = Path(sys.argv[1])
    rounds = int(sys.argv[2])
    with np.load(folder / "feeds.npz") as arrays:
        feeds = {name: arrays[name] for name in arrays.files}
    train((folder / "train.onnx").read_bytes(), feeds, rounds)
    print(json.dumps({"peak_kib": _peak_kib()}))


if __name__ == "__main__":
    main()
