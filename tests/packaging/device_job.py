"""One device's whole work in one process: install a release, answer, train, seal; then say what was imported.

Run as `python device_job.py BUNDLE_FOLDER SCRATCH_FOLDER`, by any interpreter that has Shoal's base install;
prints one JSON object. Nothing here is a test: `test_wheel.py` runs it and judges what it prints.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import numpy as np

from edge_agent.release.files import SlotContents
from edge_agent.release.selftest import ChildSelfTest
from edge_agent.release.slots import Slots
from edge_agent.rounds.jobs import Assignment, Samples, do_evaluate, do_train
from edge_agent.rounds.learning import TrainPolicy
from edge_agent.runtime import Runtime
from wire import codec
from wire.blobs import make_ref
from wire.envelope import Expect, Signer, open_sealed, seal
from wire.header import Header
from wire.manifest import CHECKPOINT, GOLDEN_INPUTS, GOLDEN_OUTPUTS, GRAPH_FILES, MANIFEST, RELEASE
from wire.messages import Invitation, Order, TrainConfig, Update, decode_body, encode_body
from wire.primitives import KemPrivateKey, SigningKey, sha256

PACKAGES = ("wire", "process", "edge_agent")
FRAMEWORKS = ("torch", "flwr", "onnx", "onnxscript", "sqlalchemy", "ray")
NOW = 1_800_000_000.0


def import_everything() -> list[str]:
    """Imports every module of the packages of a device; returns their names."""
    names = []
    for package in PACKAGES:
        found = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        names += [package, *(module.name for module in found)]
    for name in names:
        importlib.import_module(name)
    return names


def install(bundle: Path, scratch: Path) -> SlotContents:
    """Stages the bundle's first release, tests it in a child process, makes it current."""
    names = (RELEASE, MANIFEST, CHECKPOINT, GOLDEN_INPUTS, GOLDEN_OUTPUTS, *GRAPH_FILES)
    slots = Slots(scratch)
    staged = slots.stage({name: bundle / name for name in names})
    ChildSelfTest(scratch / "selftest").check(staged.contents)
    return slots.promote(staged)


def assignment(contents: SlotContents, kind: str) -> Assignment:
    """An order of a round whose head is the release, with samples that can be told apart."""
    manifest = contents.manifest
    rng = np.random.default_rng(0)
    y = np.arange(48) % manifest.task.classes
    x = rng.normal(y[:, None], 0.3, (48, *manifest.input_shape)).astype(np.float32)
    head = contents.checkpoint().to_bytes()
    order = Order(
        order_id=b"o" * 16,
        kind=kind,  # type: ignore[arg-type]
        run="main",
        round_number=1,
        head_sha256=sha256(head),
        deadline=NOW + 60,
        slot_bytes=2**20,
    )
    invitation = Invitation(
        run="main",
        round_number=1,
        open=True,
        deadline=NOW + 60,
        graphs_sha256=bytes.fromhex(contents.graphs_sha256),
        head=make_ref(head),
        train=TrainConfig(epochs=4, learning_rate=0.1),
    )
    train, validation = Samples(x[:32], y[:32]), Samples(x[32:], y[32:])
    return Assignment("device-1", order, invitation, contents, head, train, validation, TrainPolicy())


def seal_and_open(update: Update, schema: bytes) -> tuple[int, Update]:
    """What travels, in bytes, and what the other side reads."""
    device, cloud = SigningKey.generate(), KemPrivateKey.generate()
    header = Header(
        type="up",
        direction="up",
        tenant="acme",
        fleet="watches",
        device="device-1",
        epoch=1,
        seq=1,
        schema=schema,
    )
    message = seal(header, encode_body(update), signer=device, recipient=cloud.public_key, pad=True)
    opened = open_sealed(
        message,
        signers={device.key_id: Signer("device-1", device.verify_key)},
        recipients={cloud.key_id: cloud},
        expect=Expect("up", "acme", "watches", "up", "device-1"),
        now=NOW,
        limit_bytes=2**20,
    )
    return len(message), decode_body(opened.body, Update)


def main(bundle: Path, scratch: Path) -> None:
    modules = import_everything()
    contents = install(bundle, scratch)
    engine = Runtime()
    inputs = np.frombuffer(contents.read(GOLDEN_INPUTS), "<f4").reshape(contents.manifest.golden_inputs_shape)
    answers = engine.load_inference(contents.int8()).run(inputs)
    update, _ = do_train(engine, assignment(contents, "train"), lambda: False)
    evaluation = do_evaluate(engine, assignment(contents, "evaluate"))
    size_bytes, read = seal_and_open(update, bytes.fromhex(contents.graphs_sha256))
    vector = codec.decode(read.payload, read.codec, read.params_size)
    result = {
        "modules": modules,
        "from": str(Path(importlib.import_module("wire").__file__ or "").parent.parent),
        "answers": list(answers.shape),
        "loss": [update.metrics["loss_first"], update.metrics["loss_last"]],
        "accuracy": evaluation.metrics["accuracy"],
        "sealed_bytes": size_bytes,
        "update_norm": float(np.linalg.norm(vector)),
        "frameworks": sorted({name.partition(".")[0] for name in sys.modules} & set(FRAMEWORKS)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
