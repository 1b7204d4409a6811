"""A bundle built, opened, damaged; and candidates for a release made from new parameters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import ort
from models.build import build_bundle, check_bundle
from models.bundle import CALIBRATION, Bundle
from models.candidate import CandidateMaker
from models.card import CardNotes
from models.evaluate import answers_of, evaluate
from models.pretrain import pretrain
from models.task import Task
from wire import manifest as names
from wire.checkpoint import Checkpoint
from wire.errors import BundleError, DataError
from wire.manifest import Release, TaskSpec
from wire.materialize import materialize_int8

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
SHAPE = (2, 16)
TASK = Task.classification(3)


class Net(nn.Module):
    """Convolution with BatchNorm, so that buffers and folding are in play, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(functional.relu(self.norm(self.conv(x))).mean(2))
        return answer


def samples(count: int, seed: int) -> tuple[Floats, Labels]:
    """Three classes, told apart by the amplitude of the first channel."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    x = rng.standard_normal((count, *SHAPE)).astype(np.float32)
    x[:, 0] *= (1.0 + 2.0 * y[:, None]).astype(np.float32)
    return x, y.astype(np.int64)


def trained() -> nn.Module:
    torch.manual_seed(0)
    module = Net()
    pretrain(module, TASK, *samples(600, seed=1), epochs=15, learning_rate=0.01)
    return module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_bundle(
        trained(),
        TASK,
        SHAPE,
        samples(700, seed=2)[0],
        name="net",
        out_dir=tmp_path_factory.mktemp("bundles") / "net",
        labels=("low", "middle", "high"),
        evaluation=samples(500, seed=3),
        notes=CardNotes(summary="Tells amplitudes apart.", federated="Not trained by a fleet yet."),
        created=12.0,
    )


def test_bundle_holds_the_documented_files(bundle: Bundle) -> None:
    found = {path.name for path in bundle.folder.iterdir()}
    assert found == {
        *(names.MANIFEST, names.TEMPLATE, names.FLOAT32, names.TRAIN_SGD, names.TRAIN_ADAM),
        *(names.RELEASE, names.CHECKPOINT, names.GOLDEN_INPUTS, names.GOLDEN_OUTPUTS),
        *(names.RANGES, CALIBRATION, names.CARD),
    }
    assert [ref.name for ref in bundle.manifest.files] == list(names.GRAPH_FILES)
    assert bundle.calibration().shape == (512, *SHAPE)
    assert bundle.golden_inputs().shape == (8, *SHAPE)
    assert bundle.release.created == 12.0


def test_bundle_opens_with_the_same_contents(bundle: Bundle) -> None:
    again = Bundle.open(bundle.folder)
    assert again.manifest == bundle.manifest
    assert again.release == bundle.release
    assert again.checkpoint() == bundle.checkpoint()
    check_bundle(again)


def test_int8_file_of_a_bundle_learned_its_task(bundle: Bundle) -> None:
    metrics = bundle.release.metrics
    assert metrics["accuracy_float32"] > 0.85
    assert metrics["accuracy_int8"] > metrics["accuracy_float32"] - 0.02
    int8 = materialize_int8(bundle.read(names.TEMPLATE), bundle.manifest, bundle.checkpoint())
    score = evaluate(int8, bundle.manifest.task, *samples(500, seed=3))
    assert score.metric == metrics["accuracy_int8"]
    assert score.samples == 500


def test_train_step_of_a_bundle_lowers_the_loss(bundle: Bundle) -> None:
    x, y = samples(64, seed=4)
    manifest = bundle.manifest
    for name, state, rate in (
        (names.TRAIN_SGD, manifest.opt_state_sizes.sgd, 0.05),
        (names.TRAIN_ADAM, manifest.opt_state_sizes.adam, 0.01),
    ):
        rng = np.random.default_rng(0)
        feeds = {
            "params": rng.normal(size=manifest.params_size).astype(np.float32) * np.float32(0.1),
            "opt_state": np.zeros(state, np.float32),
            "buffers": bundle.checkpoint().buffers,
            "x": x,
            "y": y,
            "index": np.arange(64).reshape(1, 64).repeat(150, axis=0),
            "weights": np.ones((150, 64), np.float32),
            "anchor": np.zeros(manifest.params_size, np.float32),
            "seed": np.int64(0),
            "momentum": np.float32(0.9),
            **{key: np.float32(0) for key in ("weight_decay", "mu")},
            "lr": np.float32(rate),
        }
        losses = ort.run(ort.make_session(bundle.read(name)), feeds)["loss"]
        assert losses[-1] < losses[0] - 0.1, name


@pytest.mark.slow
def test_build_is_reproducible(bundle: Bundle, tmp_path: Path) -> None:
    again = build_bundle(
        trained(),
        TASK,
        SHAPE,
        samples(700, seed=2)[0],
        name="net",
        out_dir=tmp_path / "again",
        labels=("low", "middle", "high"),
    )
    assert again.manifest.graphs_sha256 == bundle.manifest.graphs_sha256
    assert again.release.int8_sha256 == bundle.release.int8_sha256


def test_card_says_what_a_person_needs(bundle: Bundle) -> None:
    card = (bundle.folder / names.CARD).read_text()
    for wanted in (
        "# net",
        "Tells amplitudes apart.",
        "low, middle, high",
        "accuracy int8",
        f"{bundle.release.metrics['accuracy_int8']:.4f}",
        bundle.manifest.graphs_sha256,
        "Not trained by a fleet yet.",
    ):
        assert wanted in card


def replace_in(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def other_release(**change: object) -> Callable[[bytes], bytes]:
    return lambda data: msgspec.structs.replace(Release.from_bytes(data), **change).to_bytes()


DAMAGE = {
    **{
        f"flipped {name}": replace_in(name, flip)
        for name in (*names.GRAPH_FILES, names.RANGES, CALIBRATION, names.GOLDEN_INPUTS, names.GOLDEN_OUTPUTS)
    },
    **{
        f"missing {name}": lambda folder, name=name: (folder / name).unlink()
        for name in (names.MANIFEST, names.RELEASE, names.CHECKPOINT, names.TEMPLATE)
    },
    "pipe": lambda folder: ((folder / names.TEMPLATE).unlink(), os.mkfifo(folder / names.TEMPLATE)),
    "folder": lambda folder: ((folder / names.TEMPLATE).unlink(), (folder / names.TEMPLATE).mkdir()),
    "longer file": replace_in(names.TEMPLATE, lambda data: data + b"\0"),
    "checkpoint of another release": replace_in(
        names.CHECKPOINT,
        lambda data: Checkpoint(
            Checkpoint.from_bytes(data).params + np.float32(1),
            Checkpoint.from_bytes(data).buffers,
            Checkpoint.from_bytes(data).ranges,
        ).to_bytes(),
    ),
    "release for other graphs": replace_in(names.RELEASE, other_release(graphs_sha256="00" * 32)),
    "manifest that is no JSON": replace_in(names.MANIFEST, lambda _: b"{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_bundle_does_not_open(bundle: Bundle, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    Bundle.open(folder)
    damage(folder)
    with pytest.raises(BundleError):
        Bundle.open(folder)


@pytest.mark.parametrize("field", ["int8_sha256", "float32_sha256"])
def test_bundle_that_makes_other_files_is_refused(bundle: Bundle, tmp_path: Path, field: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    replace_in(names.RELEASE, other_release(**{field: "00" * 32}))(folder)
    with pytest.raises(BundleError, match="does not make the file"):
        check_bundle(Bundle.open(folder))


def test_taken_folder_is_refused_and_left_alone(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    files = {path.name: path.read_bytes() for path in bundle.folder.iterdir()}
    for name in (names.MANIFEST, names.RELEASE, names.CARD):
        del files[name]
    with pytest.raises(BundleError, match="cannot be written"):
        Bundle.write(folder, bundle.manifest, bundle.release, files, "card")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_incomplete_bundle_leaves_nothing_behind(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot read"):
        Bundle.write(tmp_path / "new", bundle.manifest, bundle.release, {}, "card")
    assert list(tmp_path.iterdir()) == []


def test_candidate_of_the_same_parameters_is_the_release(bundle: Bundle) -> None:
    checkpoint = bundle.checkpoint()
    candidate = CandidateMaker(bundle).make(checkpoint.params, checkpoint.buffers)
    np.testing.assert_allclose(candidate.checkpoint.ranges, checkpoint.ranges, rtol=1e-4, atol=1e-5)
    assert candidate.release(1, {}, 0.0).float32_sha256 == bundle.release.float32_sha256


def test_candidate_of_new_parameters_has_its_own_ranges_and_answers(bundle: Bundle) -> None:
    checkpoint = bundle.checkpoint()
    candidate = CandidateMaker(bundle).make(checkpoint.params * np.float32(3), checkpoint.buffers)
    release = candidate.release(7, {"accuracy_int8": 0.5}, 99.0)
    assert release == Release.from_bytes(release.to_bytes())
    assert (release.version, release.graphs_sha256) == (7, bundle.manifest.graphs_sha256)
    assert release.int8_sha256 != bundle.release.int8_sha256
    rebuilt = materialize_int8(bundle.read(names.TEMPLATE), bundle.manifest, candidate.checkpoint)
    assert rebuilt == candidate.int8
    golden = np.frombuffer(candidate.golden_outputs, "<f4").reshape(bundle.manifest.golden_outputs_shape)
    np.testing.assert_array_equal(golden[0], answers_of(rebuilt, bundle.golden_inputs()))
    assert np.abs(golden[0] - golden[1]).max() < 0.1 * np.abs(golden[1]).max()


@pytest.mark.parametrize(
    "windows",
    [
        np.zeros((0, *SHAPE), np.float32),
        np.zeros((5, 3, 16), np.float32),
        np.zeros((5, *SHAPE), np.float64),
        np.full((5, *SHAPE), np.nan, np.float32),
    ],
    ids=["none", "shape", "type", "nan"],
)
def test_wrong_calibration_samples_are_refused(windows: Floats, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        build_bundle(Net(), TASK, SHAPE, windows, name="net", out_dir=tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


CLASSIFICATION = TaskSpec(
    kind="classification", loss="cross_entropy", metric="accuracy", higher_is_better=True, classes=3
)


def test_evaluation_is_that_of_the_task_in_torch(bundle: Bundle) -> None:
    x, y = samples(300, seed=8)
    model = materialize_int8(bundle.read(names.TEMPLATE), bundle.manifest, bundle.checkpoint())
    logits = torch.from_numpy(answers_of(model, x))
    score = evaluate(model, CLASSIFICATION, x, y)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    assert score.loss == pytest.approx(float(TASK.sample_losses(logits, inputs, labels).mean()), rel=1e-5)
    assert score.metric == pytest.approx(float(TASK.sample_metrics(logits, inputs, labels).mean()), abs=1e-6)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((0, *SHAPE), np.float32), np.zeros(0, np.int64)),
        (np.zeros((2, *SHAPE), np.float32), np.zeros(1, np.int64)),
        (np.zeros((1, *SHAPE), np.float32), np.array([3])),
        (np.zeros((1, *SHAPE), np.float32), np.array([-1])),
    ],
    ids=["none", "lengths", "label", "negative"],
)
def test_wrong_evaluation_data_is_refused(x: Floats, y: Labels) -> None:
    with pytest.raises(DataError):
        evaluate(b"", CLASSIFICATION, x, y)
