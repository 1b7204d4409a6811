"""One mutated model on its way through a device: published, installed, and asked a thousand times.

Each trial is an agent of its own: a process with the device's real installer, self-test, slots and serving in it, which
ends when the trial does. Laws of the file: the release is signed rightly (every hash is right, and the golden answers
are the mutant's own where it gives any, so that it is not wrong answers that stop it); what passes is served in the
agent's own process, as on a device; only how the agent itself ends counts as its death.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edge_agent.child import Ended
from edge_agent.inference.serving import Serving
from edge_agent.ports import SelfTestVerdict
from edge_agent.release import selftest
from edge_agent.release.files import SlotContents
from edge_agent.release.install import Installer
from edge_agent.release.memory_slots import MemorySlots, SharedReleases
from edge_agent.release.source import Held, Known, Offer
from edge_agent.runtime import Runtime
from edge_agent.settings import ReleaseSettings
from edge_agent.store.storage import MEMORY, open_database
from edge_agent.uplink.online_keys import OnlineKeys
from process.clock import SystemClock
from tests.fuzz.models.seeds import Seed
from wire.checkpoint import Checkpoint
from wire.errors import BundleError, ModelError, SelfTestError, ShoalError
from wire.manifest import FileRef, Manifest, Release, StateSizes, TaskSpec, TensorSlot
from wire.manifest_layout import Float32Layout, Int8Layout

GOLDEN = 8
INPUTS = 1000
SELFTEST_SECONDS, SELFTEST_CPU, SELFTEST_BYTES = 20.0, 2, 2**30
SERVE_SECONDS = 60.0
AGENT_BYTES = 6 * 2**30
"""Address space of a trial's agent: it must not take this machine along."""
BEFORE_RUNTIME, AGENT_DIED = "refused by our checks", "agent died"
TOO_SLOW = "served, too slow for the trial"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended: the word, the reason in the product's own words, and how many inputs were answered."""

    word: str
    reason: str = ""
    served: int = 0
    agent_bytes: int = 0


# ---- the publisher -----------------------------------------------------------------------------------------


def release_of(
    seed: Seed, int8: bytes, float32: bytes, version: int, answers: NDArray[np.float32]
) -> dict[str, bytes]:
    """The files of a release, every hash as it must be. Nothing is patched into its graphs.

    Args:
        answers: float32 [2, G, …].
    """
    x = golden_inputs(seed)
    checkpoint = Checkpoint(
        params=np.zeros(1, np.float32), buffers=np.zeros(0, np.float32), ranges=np.zeros((0, 2), np.float32)
    ).to_bytes()
    files = {
        "template.onnx": int8,
        "float32.onnx": float32,
        "train_sgd.onnx": seed.float32,
        "train_adam.onnx": seed.float32,
    }
    is_anomaly, classes = seed.is_anomaly, seed.answer_shape[-1]
    manifest = Manifest(
        model="mutant",
        task=TaskSpec(
            kind="anomaly" if is_anomaly else "classification",
            loss="mse" if is_anomaly else "cross_entropy",
            metric="error" if is_anomaly else "accuracy",
            higher_is_better=not is_anomaly,
            classes=0 if is_anomaly else classes,
        ),
        input_shape=seed.input_shape,
        output_name="logits",
        params_size=1,
        buffers_size=0,
        opt_state_sizes=StateSizes(sgd=0, adam=0),
        params=(TensorSlot(name="p", shape=(1,), offset=0, size=1),),
        buffers=(),
        ranges_count=0,
        int8=Int8Layout(weight_max=127, layers=(), ranges=()),
        float32=Float32Layout(layers=()),
        files=tuple(FileRef.of(name, data) for name, data in files.items()),
        golden_inputs_shape=x.shape,
        golden_outputs_shape=answers.shape,
        tolerance=0.1,
    )
    x_bytes, y_bytes = x.tobytes(), answers.astype("<f4").tobytes()
    release = Release(
        version=version,
        graphs_sha256=manifest.graphs_sha256,
        checkpoint_sha256=_sha256(checkpoint),
        int8_sha256=_sha256(int8),
        float32_sha256=_sha256(float32),
        golden_inputs=FileRef.of("golden_inputs.bin", x_bytes),
        golden_outputs=FileRef.of("golden_outputs.bin", y_bytes),
    )
    return {
        **files,
        "manifest.json": manifest.to_bytes(),
        "release.json": release.to_bytes(),
        "checkpoint.bin": checkpoint,
        "golden_inputs.bin": x_bytes,
        "golden_outputs.bin": y_bytes,
    }


def golden_inputs(seed: Seed) -> NDArray[np.float32]:
    drawn = np.random.default_rng(11).normal(0.0, 1.0, (GOLDEN, *seed.input_shape))
    return drawn.astype("<f4")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def own_answers(seed: Seed, model: bytes) -> NDArray[np.float32] | None:
    """What a model says to the golden inputs, found out in a process of its own; None where it says nothing usable."""
    shape = (GOLDEN, *seed.answer_shape)

    def ask() -> bytes:
        said = Runtime().load_inference(model).run(golden_inputs(seed))
        return said.astype("<f4").tobytes() if said.shape == shape and np.isfinite(said).all() else b""

    code, output = forked(ask, seconds=SELFTEST_SECONDS, memory_bytes=SELFTEST_BYTES)
    if code != 0 or len(output) != 4 * int(np.prod(shape)):
        return None
    return np.frombuffer(output, "<f4").reshape(shape)


# ---- processes ---------------------------------------------------------------------------------------------


def forked(call: Callable[[], bytes], *, seconds: float, memory_bytes: int = 0) -> tuple[int, bytes]:
    """Runs a call in a child of this process; (exit code or minus the signal, what it returned). Minus 64: too long."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_child(call, writing, memory_bytes)
    os.close(writing)
    output, end = b"", time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
        piece = os.read(reading, 65_536) if ready else None
        if not piece:
            break
        output += piece
    os.close(reading)
    if piece is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return (-64 if piece is None else os.waitstatus_to_exitcode(status)), output


def _be_child(call: Callable[[], bytes], writing: int, memory_bytes: int) -> NoReturn:
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for each in (0, 1, 2):
            os.dup2(null, each)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory_bytes:
            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        data = call()
        while data:
            data = data[os.write(writing, data) :]
        code = 0
    except (ShoalError, MemoryError, OSError, ValueError) as error:
        code = 2
        os.write(writing, repr(error).encode()[:300])
    except Exception:  # noqa: BLE001
        # The outermost end of a process: what nobody expected is told by its last lines.
        os.write(writing, traceback.format_exc()[-600:].encode())
    finally:
        os._exit(code)


class ForkedSelfTest:
    """The product's self-test, in a child that has its imports already: a start of Python saved, the rest the same."""

    def check(self, contents: SlotContents) -> SelfTestVerdict:
        staged = selftest.model_of(contents)
        with tempfile.TemporaryDirectory(prefix="shoal-trial-") as folder:
            selftest.lay_down(staged, Path(folder))
            arguments = (folder, str(SELFTEST_BYTES), str(SELFTEST_CPU))
            code, output = forked(lambda: _said(arguments), seconds=SELFTEST_SECONDS)
        if code == -64:
            raise SelfTestError("the self-test did not end in time", seconds=SELFTEST_SECONDS)
        ended = Ended(output[0] if code == 0 and output else code, output[1:])
        return selftest.judged(ended)


def _said(arguments: tuple[str, str, str]) -> bytes:
    spoken = io.StringIO()
    with contextlib.redirect_stdout(spoken):
        code = selftest.main(arguments)
    return bytes([code]) + spoken.getvalue().encode()


# ---- the agent ---------------------------------------------------------------------------------------------


@dataclass
class Offered:
    """A repository that offers one release after the other."""

    files: Mapping[str, bytes]
    version: int = 2

    def fetch(self, current_version: int, held: Held, known: Known) -> Offer:
        return Offer(OnlineKeys("acme", "fleet", (), ()), self.version, serial=self.version, files=self.files)

    def clear(self) -> None:
        return


_WINDOWS: dict[tuple[int, ...], list[NDArray[np.float32]]] = {}


def windows(shape: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """The same for every trial of a shape; made before a trial forks."""
    if shape not in _WINDOWS:
        _WINDOWS[shape] = _drawn(Random(repr(shape)), shape, INPUTS)
    return _WINDOWS[shape]


def _drawn(random: Random, shape: tuple[int, ...], count: int) -> list[NDArray[np.float32]]:
    """Inputs as sensors and hostile callers give them: usual ones, zeros, borders of float32, whole numbers, spikes."""
    rng = np.random.default_rng(random.getrandbits(32))
    found = []
    for number in range(count):
        x = rng.normal(0.0, 1.0, shape)
        kind = number % 10
        if kind == 1:
            x = np.full(
                shape, random.choice((0.0, -0.0, 1.0, -1.0, 255.0, 1e-45, 3.4e38, -3.4e38, 1e18, 0.5))
            )
        elif kind == 2:
            x = x * 10.0 ** random.randrange(-30, 38)
        elif kind == 3:
            x = np.round(x * random.choice((1, 3, 100)))
        elif kind == 4:
            x.reshape(-1)[random.randrange(x.size)] = random.choice(
                (3.4e38, -3.4e38, 0.0, 2.0**31, -(2.0**63), 2.0**24)
            )
        elif kind == 5:
            x = rng.integers(-4, 5, shape).astype(np.float64)
        found.append(np.nan_to_num(np.clip(x, -3.4e38, 3.4e38)).astype(np.float32))
    return found


def be_agent(
    seed: Seed,
    files: Mapping[str, bytes],
    before: Mapping[str, bytes],
    asked: Sequence[NDArray[np.float32]],
    tell: Callable[[Any], None],
) -> None:
    """Installs what is offered over the seed that serves, then answers. Tells how far it came."""
    runtime, database = Runtime(), open_database(MEMORY)
    slots = MemorySlots(SharedReleases())
    installer = Installer(Offered(files), slots, ForkedSelfTest(), runtime, database, variant="auto")
    serving = Serving(SystemClock(), lambda version, reason: None)
    # The seed is sound, and has been installed once before in this run of trials.
    serving.swap(installer.load(SharedReleases().verified(before)), None)
    try:
        model = _installed(installer)
    except (ShoalError, OSError) as error:
        tell(_refusal(error))
        return
    serving.swap(model, serving.current)
    tell({"stage": "serving"})
    limits, errors, answered = ReleaseSettings(), 0, 0
    end = time.monotonic() + SERVE_SECONDS
    for x in asked:
        answered += 1
        try:
            errors += serving.infer(x, "s").release_version != 2
        except ModelError:
            errors += 1  # the seed has no finite answer to this one either; its caller is told
        if answered % 100 == 0 and serving.watch is not None:
            serving.watch.look(limits)
        if time.monotonic() > end:
            break
    word = "served" if not errors else "served, errors answered by the predecessor"
    if answered < INPUTS:
        word = TOO_SLOW
    tell(
        {"word": word, "served": answered, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    )


def _installed(installer: Installer) -> Any:
    found = installer.check().installed
    if found is None:
        raise ModelError("nothing was installed")
    return found[1]


def _refusal(error: Exception) -> dict[str, Any]:
    text = str(error)
    if isinstance(error, BundleError):
        word = BEFORE_RUNTIME
    elif "signal" in text or "without a verdict" in text:
        # The kernel ends a child that is over its CPU time by the one or the other.
        is_late = any(f"signal {int(each)})" in text for each in (signal.SIGXCPU, signal.SIGKILL))
        word = "timed out" if is_late else "died in the child"
    elif "did not end" in text:
        word = "timed out"
    elif any(each in text for each in ("bad_alloc", "memory", "allocate", "MemoryError")):
        word = "over memory"
    elif "does not load" in text or "an inference graph takes" in text:
        word = "refused by the runtime"
    else:
        word = "wrong answers"
    return {"word": word, "reason": text[:300]}


def try_model(seed: Seed, mutated: bytes, number: int) -> Outcome:
    """One trial; the mutant is both files of the release, or one of them, by the number."""
    int8, float32 = ((mutated, mutated), (mutated, seed.float32), (seed.int8, mutated))[number % 3]
    sound = {seed.int8: sound_answers(seed, seed.int8), seed.float32: sound_answers(seed, seed.float32)}
    before = release_of(seed, seed.int8, seed.float32, 1, np.stack([sound[seed.int8], sound[seed.float32]]))
    own = own_answers(seed, mutated)
    said = [
        sound[each] if each in sound else (sound[seed.int8] if own is None else own)
        for each in (int8, float32)
    ]
    files = release_of(seed, int8, float32, 2, np.stack(said))
    asked = windows(seed.input_shape)
    return watched(lambda tell: be_agent(seed, files, before, asked, tell))


def watched(life: Callable[[Callable[[Any], None]], None]) -> Outcome:
    """Lives an agent's life in a process of its own; how it ended, and how far it came."""

    def live() -> bytes:
        resource.setrlimit(resource.RLIMIT_AS, (AGENT_BYTES, AGENT_BYTES))
        lines: list[Any] = []
        life(lines.append)
        return json.dumps(lines[-1]).encode()

    code, output = forked(live, seconds=3 * SELFTEST_SECONDS + 2 * SERVE_SECONDS)
    if code == -64:
        return Outcome(TOO_SLOW, "an answer did not come")
    if code != 0:
        return Outcome(AGENT_DIED, f"exit {code}: {output[-400:]!r}")
    said = json.loads(output)
    return Outcome(said["word"], said.get("reason", ""), said.get("served", 0), said.get("bytes", 0))


_SOUND: dict[bytes, NDArray[np.float32]] = {}


def sound_answers(seed: Seed, model: bytes) -> NDArray[np.float32]:
    """What a file of a seed says to its golden inputs."""
    if model not in _SOUND:
        said = own_answers(seed, model)
        if said is None:
            raise ModelError(f"the seed {seed.name} does not answer", hint="a seed is a sound model")
        _SOUND[model] = said
    return _SOUND[model]
