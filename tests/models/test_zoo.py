"""The zoo: every model is listed, has the shape that it states, and can be trained by its train step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import zoo
from models.flat import flatten_params
from models.train_step import export_train_step, verify_train_step
from wire.errors import ConfigurationError

ZOO_FOLDER = Path(zoo.__file__).parent


def test_zoo_lists_every_file() -> None:
    files = {path.stem for path in ZOO_FOLDER.glob("*.py")} - {"__init__"}
    assert files == set(zoo.ZOO)


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_zoo_model_answers_what_its_task_needs(name: str) -> None:
    model = zoo.load(name)
    x = torch.zeros(3, *model.input_shape)
    model.task.check_outputs(model.make_model()(x), x)


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_zoo_model_is_small(name: str) -> None:
    params = flatten_params(zoo.load(name).make_model())
    assert 500 < params.size < 150_000


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_zoo_model_trains_as_in_torch(name: str, optimizer: str) -> None:
    model = zoo.load(name)
    torch.manual_seed(1)
    module = model.make_model()
    export = export_train_step(module, model.task, model.input_shape, optimizer)
    verify_train_step(export, module, model.task, seed=1)


def test_zoo_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError) as caught:
        zoo.load("watch_cnn")
    assert "watch_cnn1d" in caught.value.hint
