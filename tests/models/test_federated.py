"""The results behind the zoo's model cards: each model has one, of the architecture that it has now, and shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from models import federated, zoo
from models.federated import FederatedResult, answers_of, keep, results
from models.zoo_card import card_notes
from wire.errors import DataError

RESULT = FederatedResult(
    command="shoal-fleet simulate",
    data="some data",
    split_hash="ab" * 32,
    seed=1,
    devices=4,
    rounds=3,
    releases=2,
    hold_backs=1,
    strategy="FedAvg",
    codec="dithered",
    samples=1200,
    metric="accuracy",
    int8_first=0.5,
    int8_last=0.75,
    float32_first=0.51,
    float32_last=0.76,
    update_bytes_ratio=0.06,
)


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_zoo_model_has_a_result_of_its_present_architecture(name: str) -> None:
    model = zoo.load(name)
    result = results()[name]
    # After a change of a model: `python -m bench cards`.
    assert result.fits(model.make_model(), model.input_shape)
    assert result.metric == model.task.metric
    assert f"--model {name} " in result.command


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_zoo_model_became_better_by_federation(name: str) -> None:
    model, result = zoo.load(name), results()[name]
    gain = result.int8_last - result.int8_first
    assert gain > 0 if model.task.higher_is_better else gain < 0
    assert 0 < result.update_bytes_ratio < 0.15
    assert result.releases > 1


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_card_of_a_zoo_model_says_what_it_reached_and_where_it_must_not_be_used(name: str) -> None:
    notes = card_notes(name, zoo.load(name).make_model())
    assert notes.federated == results()[name].text()
    assert notes.limits
    assert notes.data


def test_result_of_another_architecture_is_not_shown() -> None:
    wider = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    assert card_notes("digits_mlp", wider).federated == ""


@pytest.mark.parametrize(
    "other",
    [
        nn.Sequential(nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)),
        nn.Sequential(nn.Conv1d(2, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
        nn.Sequential(nn.Conv1d(2, 4, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        nn.Linear(3, 3),
    ],
    ids=["activation", "padding", "kernel", "shape"],
)
def test_result_fits_its_architecture_alone(other: nn.Module) -> None:
    def made() -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        )

    torch.manual_seed(1)
    result = replace(RESULT, answers=answers_of(made(), (2, 8)))
    assert result.fits(made(), (2, 8))
    assert not result.fits(other, (2, 8))


def test_answers_leave_the_module_as_it_was() -> None:
    module = nn.Linear(4, 2).train()
    before = [value.clone() for value in module.state_dict().values()]
    answers_of(module, (4,))
    assert module.training
    assert all(torch.equal(a, b) for a, b in zip(before, module.state_dict().values(), strict=True))


def test_text_states_first_and_last_in_the_metrics_own_unit() -> None:
    text = RESULT.text()
    assert "| int8, as devices serve it | 50.0% | 75.0% |" in text
    assert "| float32, for comparison | 51.0% | 76.0% |" in text
    assert "4 devices, 3 rounds of FedAvg" in text
    error = replace(
        RESULT, metric="mse", separation_first={"noise": 0.5}, separation_last={"noise": 0.875}
    ).text()
    assert "| int8, as devices serve it | 0.5000 | 0.7500 |" in error
    assert "| AUC against noise | 0.500 | 0.875 |" in error


def test_kept_result_is_read_back_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federated, "FILE", tmp_path / "federated.json")
    results.cache_clear()
    result = replace(RESULT, answers=(1.0, 2.0))
    keep({"a": result})
    keep({"b": RESULT})
    assert results() == {"a": result, "b": RESULT}
    keep({"a": RESULT})
    assert results() == {"a": RESULT, "b": RESULT}
    results.cache_clear()


@pytest.mark.parametrize("text", ["", "[1]", json.dumps({"a": {"command": "x"}})])
def test_damaged_results_say_how_to_make_them(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "federated.json"
    damaged.write_text(text)
    monkeypatch.setattr(federated, "FILE", damaged)
    results.cache_clear()
    with pytest.raises(DataError) as caught:
        results()
    assert "bench cards" in caught.value.hint
    results.cache_clear()
