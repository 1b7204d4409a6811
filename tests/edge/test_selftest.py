"""The self-test of a release: what passes, what is caught, and what a bad model can do to the agent (nothing)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edge_agent.release.files import SlotContents, read_contents, reader_of
from edge_agent.release.selftest import (
    ChildSelfTest,
    InlineSelfTest,
    StagedModel,
    compare_with_golden,
    lay_down,
    model_of,
    pick_up,
)
from edge_agent.runtime import Runtime
from models.bundle import Bundle
from wire.errors import SelfTestError
from wire.manifest import GRAPH_FILES


def contents_of(bundle: Bundle, changed: Mapping[str, bytes] | None = None) -> SlotContents:
    names = ("manifest.json", "release.json", "checkpoint.bin", "golden_inputs.bin", "golden_outputs.bin")
    files: dict[str, bytes] = {name: (bundle.folder / name).read_bytes() for name in (*names, *GRAPH_FILES)}
    contents = read_contents(reader_of({**files, **(changed or {})}))
    return read_contents(reader_of({**files, **(changed or {}), "int8.onnx": contents.rebuild_int8()}))


def staged_of(bundle: Bundle) -> StagedModel:
    return model_of(contents_of(bundle))


def changed(staged: StagedModel, **values: object) -> StagedModel:
    facts = {name: getattr(staged, name) for name in StagedModel.__slots__}
    return StagedModel(**{**facts, **values})


class Fixed(ChildSelfTest):
    """The child test on a staged model that a test has damaged."""

    def run_on(self, staged: StagedModel, folder: Path) -> None:
        lay_down(staged, folder)
        from edge_agent.release.selftest import judged

        judged(self._run(str(folder)))


def test_good_release_passes_in_a_child_and_both_variants_are_measured(bundle: Bundle) -> None:
    verdict = ChildSelfTest().check(contents_of(bundle))
    assert verdict.variant in ("int8", "float32")
    assert verdict.int8_seconds > 0 < verdict.float32_seconds


def test_release_laid_down_is_picked_up_unchanged(bundle: Bundle, tmp_path: Path) -> None:
    staged = staged_of(bundle)
    lay_down(staged, tmp_path)
    again = pick_up(tmp_path)
    assert (again.int8, again.float32, again.tolerance) == (staged.int8, staged.float32, staged.tolerance)
    np.testing.assert_array_equal(again.golden_outputs, staged.golden_outputs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"int8": b"no model"}, "int8: the model does not load"),
        ({"float32": b""}, "float32: the model does not load"),
        ({"golden_inputs": np.zeros((8, 5), np.float32)}, "does not fit"),
        ({"golden_outputs": np.zeros((2, 8, 4), np.float32)}, "the shape"),
        (
            {"golden_outputs": np.full((2, 8, 3), 99.0, np.float32), "tolerance": 1e-3},
            "differ from the golden",
        ),
    ],
)
def test_wrong_model_is_caught_in_process(bundle: Bundle, values: dict[str, object], message: str) -> None:
    with pytest.raises(SelfTestError, match=message):
        compare_with_golden(Runtime(), changed(staged_of(bundle), **values))


def test_wrong_model_is_caught_in_the_child(bundle: Bundle, tmp_path: Path) -> None:
    wrong = changed(staged_of(bundle), golden_outputs=np.full((2, 8, 3), 99.0, np.float32), tolerance=1e-3)
    with pytest.raises(SelfTestError, match="differ from the golden ones by"):
        Fixed().run_on(wrong, tmp_path)


def test_child_that_dies_by_a_signal_is_a_self_test_error(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(SelfTestError, match="killed the self-test"):
        Fixed(cpu_seconds=0).run_on(staged_of(bundle), tmp_path)


def test_child_without_memory_is_a_self_test_error(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(SelfTestError):
        Fixed(memory_bytes=8 * 2**20).run_on(staged_of(bundle), tmp_path)


def test_child_that_takes_too_long_is_a_self_test_error(bundle: Bundle) -> None:
    with pytest.raises(SelfTestError, match="did not end"):
        ChildSelfTest(timeout_seconds=0.01).check(contents_of(bundle))


def test_child_leaves_nothing_in_its_folder(bundle: Bundle, tmp_path: Path) -> None:
    ChildSelfTest(tmp_path / "scratch").check(contents_of(bundle))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_inline_verdict_is_given_once_for_each_content_and_never_from_timings(bundle: Bundle) -> None:
    selftest = InlineSelfTest(Runtime(kept=2))
    contents = contents_of(bundle)
    assert selftest.check(contents) == selftest.check(contents)
    assert selftest.check(contents).variant == "int8"
    assert len(selftest._passed) == 1
