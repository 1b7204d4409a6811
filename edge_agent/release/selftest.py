"""The self-test of a staged model, in a child process: 14 of 4,000 mutated models abort ONNX Runtime.

Laws of the file: the child has limits on memory, CPU time, wall time and open files, cannot write a file and
gets none of our secrets; the parent reads nothing from it but an exit code and one bounded JSON line. `python
-m edge_agent.release.selftest FOLDER MEMORY_BYTES CPU_SECONDS` is the child. Source: docs/architecture.md, laws 2, 5.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.child import ChildTimeoutError, Ended, run_child
from edge_agent.ports import Engine, Floats, SelfTestVerdict, Variant
from edge_agent.release.files import SlotContents
from wire.errors import SelfTestError, ShoalError
from wire.manifest import GOLDEN_INPUTS, GOLDEN_OUTPUTS

_VARIANTS: tuple[Variant, ...] = ("int8", "float32")
_VERDICT_LIMIT_BYTES = 4096
_ADDRESS_SPACE_BYTES = 8 * 2**30
_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class StagedModel:
    """A model that waits for its self-test: both variants, and what each must answer.

    Attributes:
        int8, float32: ONNX files.
        golden_inputs: float32 [G, …].
        golden_outputs: float32 [2, G, …], the answers of the int8 file, then of the float32 file.
        tolerance: an answer passes within `tolerance · max(1, |golden|max)` of its golden one.
    """

    int8: bytes
    float32: bytes
    golden_inputs: Floats
    golden_outputs: Floats
    tolerance: float


def model_of(contents: SlotContents) -> StagedModel:
    """Both variants of a release and its golden answers.

    Raises:
        BundleError: a file is not what was signed for.
    """
    manifest = contents.manifest
    inputs = np.frombuffer(contents.read(GOLDEN_INPUTS), "<f4")
    outputs = np.frombuffer(contents.read(GOLDEN_OUTPUTS), "<f4")
    if inputs.size != math.prod(manifest.golden_inputs_shape) or outputs.size != math.prod(
        manifest.golden_outputs_shape
    ):
        raise SelfTestError("the golden files do not have the shapes of the manifest")
    return StagedModel(
        int8=contents.int8(),
        float32=contents.float32(),
        golden_inputs=inputs.reshape(manifest.golden_inputs_shape),
        golden_outputs=outputs.reshape(manifest.golden_outputs_shape),
        tolerance=manifest.tolerance,
    )


class ChildSelfTest:
    """Runs the self-test in a child process.

    Args:
        folder: where the staged files are laid down for the child; None means the system's temporary folder.
        memory_bytes: private memory that the child may use.
        cpu_seconds: CPU time of the child.
        timeout_seconds: wall time of the child.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        memory_bytes: int = 2**30,
        cpu_seconds: int = 30,
        timeout_seconds: float = 120.0,
    ) -> None:
        self._folder = folder
        self._limits = [str(memory_bytes), str(cpu_seconds)]
        self._timeout_seconds = timeout_seconds

    def check(self, contents: SlotContents) -> SelfTestVerdict:
        staged = model_of(contents)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix="selftest-", dir=self._folder) as name:
            lay_down(staged, Path(name))
            return judged(self._run(name))

    def _run(self, folder: str) -> Ended:
        try:
            return run_child(
                "edge_agent.release.selftest", [folder, *self._limits], timeout_seconds=self._timeout_seconds
            )
        except ChildTimeoutError as error:
            raise SelfTestError(
                f"the self-test did not end in {self._timeout_seconds:g} seconds",
                seconds=self._timeout_seconds,
            ) from error


def judged(child: Ended) -> SelfTestVerdict:
    if child.code < 0:
        raise SelfTestError(f"the model killed the self-test (signal {-child.code})", signal=-child.code)
    try:
        verdict = json.loads(child.output[:_VERDICT_LIMIT_BYTES])
        if child.code == 0:
            return SelfTestVerdict(
                variant="int8" if verdict["variant"] == "int8" else "float32",
                int8_seconds=float(verdict["int8_seconds"]),
                float32_seconds=float(verdict["float32_seconds"]),
            )
        reason = str(verdict["error"])
    except (ValueError, KeyError, TypeError) as error:
        raise SelfTestError(
            f"the self-test ended with code {child.code} and without a verdict", exit_code=child.code
        ) from error
    raise SelfTestError(reason)


class InlineSelfTest:
    """The same comparison in this process, once for each content: simulated fleets share the verdict.

    Args:
        engine: its sessions are shared with those that serve.
        variant: what every verdict names, for a simulated fleet must not depend on timings.
    """

    def __init__(self, engine: Engine, variant: Variant = "int8") -> None:
        self._engine = engine
        self._variant: Variant = variant
        self._passed: set[str] = set()

    def check(self, contents: SlotContents) -> SelfTestVerdict:
        if contents.release_sha256 not in self._passed:
            compare_with_golden(self._engine, model_of(contents))
            self._passed.add(contents.release_sha256)
        return SelfTestVerdict(self._variant, 0.0, 0.0)


def compare_with_golden(engine: Engine, staged: StagedModel) -> None:
    """Runs both variants on the golden inputs, as one batch and window by window.

    Raises:
        SelfTestError: a variant does not load or run, or an answer is not finite, misshapen or not the golden
            one.
    """
    for number, variant in enumerate(_VARIANTS):
        golden = staged.golden_outputs[number]
        try:
            session = engine.load_inference(staged.int8 if variant == "int8" else staged.float32)
            answers = session.run(staged.golden_inputs)
            alone = session.run(staged.golden_inputs[:1])
        except ShoalError as error:
            raise SelfTestError(f"{variant}: {error}", variant=variant) from error
        _compare(variant, answers, golden, staged.tolerance)
        _compare(variant, alone, golden[:1], staged.tolerance)


def _compare(variant: Variant, answers: Floats, golden: Floats, tolerance: float) -> None:
    if answers.shape != golden.shape:
        raise SelfTestError(
            f"{variant}: answers have the shape {list(answers.shape)}, the golden ones {list(golden.shape)}"
        )
    if not np.isfinite(answers).all():
        raise SelfTestError(f"{variant}: an answer is not finite")
    allowed = tolerance * max(1.0, float(np.abs(golden).max(initial=0.0)))
    difference = float(np.abs(answers - golden).max(initial=0.0))
    if difference > allowed:
        raise SelfTestError(
            f"{variant}: answers differ from the golden ones by {difference:.3g}, allowed is {allowed:.3g}",
            difference=difference,
            allowed=allowed,
        )


def lay_down(staged: StagedModel, folder: Path) -> None:
    """Writes a staged model into a folder in the form that the child reads."""
    (folder / "int8.onnx").write_bytes(staged.int8)
    (folder / "float32.onnx").write_bytes(staged.float32)
    (folder / "golden_inputs.bin").write_bytes(staged.golden_inputs.astype("<f4").tobytes())
    (folder / "golden_outputs.bin").write_bytes(staged.golden_outputs.astype("<f4").tobytes())
    plan = {
        "inputs": staged.golden_inputs.shape,
        "outputs": staged.golden_outputs.shape,
        "tolerance": staged.tolerance,
    }
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")


def pick_up(folder: Path) -> StagedModel:
    """Reads what `lay_down` wrote."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return StagedModel(
        int8=(folder / "int8.onnx").read_bytes(),
        float32=(folder / "float32.onnx").read_bytes(),
        golden_inputs=np.fromfile(folder / "golden_inputs.bin", "<f4").reshape(plan["inputs"]),
        golden_outputs=np.fromfile(folder / "golden_outputs.bin", "<f4").reshape(plan["outputs"]),
        tolerance=float(plan["tolerance"]),
    )


def _limit_self(memory_bytes: int, cpu_seconds: int) -> None:
    for name, value in (
        (resource.RLIMIT_AS, _ADDRESS_SPACE_BYTES),
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
    ):
        _, hard = resource.getrlimit(name)
        lowered = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (lowered, lowered))


def main(arguments: Sequence[str]) -> int:
    """The child: prints the verdict or the error as one JSON line."""
    folder, memory_bytes, cpu_seconds = arguments
    _limit_self(int(memory_bytes), int(cpu_seconds))
    from edge_agent.runtime import Runtime, choose_variant

    runtime = Runtime(kept=1)
    try:
        staged = pick_up(Path(folder))
        compare_with_golden(runtime, staged)
        sessions = runtime.load_inference(staged.int8), runtime.load_inference(staged.float32)
        variant, int8_seconds, float32_seconds = choose_variant(*sessions, staged.golden_inputs)
    except (ShoalError, OSError, ValueError, MemoryError) as error:
        print(json.dumps({"error": f"{error}"[:1000] or type(error).__name__}))
        return 1
    print(json.dumps({"variant": variant, "int8_seconds": int8_seconds, "float32_seconds": float32_seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
