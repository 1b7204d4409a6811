"""A user's own module: what is refused, before anything is trained or written, and what comes out when all is well."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cloud_server.cli import main
from models.bundle import Bundle
from models.federated import results
from models.own_model import build_own_model, load_maker
from models.samples import Samples
from wire.errors import BundleError, ConfigurationError, DataError, ModelError, UnsupportedLayerError

THEIRS = """
import torch
from torch import nn

def good(): return nn.Linear(8, 3)
def number(): return 3
def needs(argument): return nn.Linear(8, 3)
def fails(): raise RuntimeError("no weights here")
def unsupported(): return nn.Sequential(nn.Bilinear(8, 8, 3))
def other_input(): return nn.Linear(7, 3)
def other_output(): return nn.Linear(8, 2)

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)
    def forward(self, x):
        return self.linear(x), x
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A user's folder; what it puts into the interpreter is taken out again."""
    path, modules = list(sys.path), set(sys.modules)
    (tmp_path / "their_models.py").write_text(THEIRS)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def samples() -> Samples:
    rng = np.random.default_rng(0)
    return Samples(rng.normal(size=(40, 8)).astype(np.float32), np.arange(40) % 3)


def test_module_of_a_user_becomes_a_bundle(folder: Path, samples: Samples) -> None:
    maker = load_maker("their_models:good", folder)
    build_own_model(
        maker, samples, name="theirs", out_dir=folder / "bundle", labels=("a", "b", "c"), epochs=1
    )
    opened = Bundle.open(folder / "bundle")
    assert (opened.manifest.model, opened.manifest.task.labels) == ("theirs", ("a", "b", "c"))
    assert opened.manifest.params_size == 27


def test_card_of_a_zoo_model_built_on_own_samples_says_what_the_zoo_knows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = Samples(rng.normal(size=(40, 64)).astype(np.float32), np.arange(40) % 10)
    maker = load_maker("digits_mlp", tmp_path)
    bundle = build_own_model(
        maker, samples, name="mine", out_dir=tmp_path / "bundle", summary="Meters.", epochs=0
    )
    card = (bundle.folder / "CARD.md").read_text(encoding="utf-8")
    assert results()["digits_mlp"].text() in card
    assert "Meters." in card
    # What it was trained on is the user's to say.
    assert "UCI" not in card
    assert "## Data" not in card


def test_zoo_model_that_learns_without_labels_needs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its task is known: the samples have no y, and what is wrong with them is their length alone."""
    np.savez(tmp_path / "samples.npz", x=np.zeros((4, 6, 50), np.float32))
    arguments = ["model", "build", "watch_autoencoder", "--data", str(tmp_path / "samples.npz")]
    assert main([*arguments, "--out", str(tmp_path / "bundle")]) != 0
    assert "(2, 6, 52) where the task needs (2, 6, 50)" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def x(:", "SyntaxError"),
        ("raise KeyError('a')", "KeyError: 'a' (broken.py, line 1)"),
        ("import nothing_like_it", "nothing_like_it"),
    ],
)
def test_module_that_does_not_import_says_why(folder: Path, text: str, said: str) -> None:
    (folder / "broken.py").write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        load_maker("broken:make", folder)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "source", ["absent:make", "their_models:absent", "their_models:", ":good", "no_zoo_model"]
)
def test_source_that_names_nothing_is_refused(folder: Path, source: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_maker(source, folder)
    assert refused.value.hint


def test_package_of_a_user_named_like_ours_is_never_found(folder: Path) -> None:
    (folder / "models").mkdir()
    (folder / "models" / "__init__.py").write_text("def make(): raise SystemExit('theirs ran')\n")
    with pytest.raises(ConfigurationError, match="has no function 'make'"):
        load_maker("models:make", folder)
    assert sys.path[-1] == str(folder)


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        ("number", ConfigurationError, "gave a int"),
        ("needs", ConfigurationError, "missing 1 required positional argument"),
        ("fails", ConfigurationError, "no weights here (their_models.py, line 8)"),
        ("unsupported", UnsupportedLayerError, "Bilinear"),
        ("other_input", ModelError, "does not take samples (8,)"),
        ("other_output", ModelError, "answers (2, 2) where the task needs (2, 3)"),
        ("Pair", ModelError, "a tuple, not one tensor"),
    ],
)
def test_module_that_cannot_be_used_is_refused_and_nothing_written(
    folder: Path, samples: Samples, function: str, kind: type[Exception], said: str
) -> None:
    maker = load_maker(f"their_models:{function}", folder)
    with pytest.raises(kind) as refused:
        build_own_model(maker, samples, name="theirs", out_dir=folder / "bundle")
    assert said in str(refused.value)
    assert not (folder / "bundle").exists()


def test_names_and_places_are_looked_at_before_training(folder: Path, samples: Samples) -> None:
    maker = load_maker("their_models:fails", folder)
    with pytest.raises(ConfigurationError, match="cannot be a model's name"):
        build_own_model(maker, samples, name="a b", out_dir=folder / "bundle")
    with pytest.raises(DataError, match="same label"):
        build_own_model(maker, samples, name="a", out_dir=folder / "bundle", labels=("a", "a", "b"))
    with pytest.raises(DataError, match="beyond the 2 labels"):
        build_own_model(maker, samples, name="a", out_dir=folder / "bundle", labels=("a", "b"))
    with pytest.raises(BundleError, match="is taken"):
        build_own_model(maker, samples, name="a", out_dir=folder)


def test_place_that_cannot_be_written_is_an_error_of_ours(folder: Path, samples: Samples) -> None:
    (folder / "file").write_text("")
    maker = load_maker("their_models:good", folder)
    with pytest.raises(BundleError, match="cannot be written"):
        build_own_model(maker, samples, name="a", out_dir=folder / "file" / "bundle", epochs=0)
