"""One thing that comes through a door (a window, a label, or both), and the answer that goes back.

Laws of the file: every item gets exactly one answer, an error included; the text forms are bounded before
they are parsed. Source: docs/reference.md, "Inputs".
"""

from __future__ import annotations

import io
import json
import math
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np

from edge_agent.inference.serving import Answer
from edge_agent.ports import Floats
from wire.errors import DataError, ShoalError, StorageError

MAX_LINE_BYTES: Final = 16 * 2**20
MAX_ID_CHARS: Final = 200
_NPY_MAGIC: Final = b"\x93NUMPY"
_KEYS: Final = frozenset({"window", "label", "id", "split"})
_SPLITS: Final = ("train", "val")
_FORM: Final = (
    'send {"window": [[…]], "label": 3, "id": "…"}; or "id" and "label" alone, to correct an answer'
)

Split = Literal["train", "val"]
Answers = Callable[[dict[str, Any]], None]


class Answering(Protocol):
    """What a door needs of an agent."""

    def infer(self, x: Floats, *, sample_id: str = "") -> Answer: ...

    def observe(self, x: Floats, label: int | None = None, split: Split | None = None) -> int: ...

    def feedback(self, sample_id: str, label: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class Item:
    """A window to answer (and to learn from, with its label), or a label for one that was answered.

    `split` says what a labelled window is kept for; None leaves it to the device's settings.
    """

    window: Floats | None = None
    label: int | None = None
    id: str = ""
    split: Split | None = None


def read_item(text: bytes) -> Item:
    """Reads one JSON object.

    Raises:
        DataError: too long, not JSON, an unknown key, a value that cannot be.
    """
    if len(text) > MAX_LINE_BYTES:
        raise DataError("a line is too long", size_bytes=len(text), limit_bytes=MAX_LINE_BYTES)
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}"[:300], hint=_FORM) from error
    if not isinstance(plain, dict) or plain.keys() - _KEYS:
        raise DataError("not an object with window, label and id only", hint=_FORM)
    label, name, window = plain.get("label"), plain.get("id", ""), plain.get("window")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
        raise DataError(f"a label is a class number, not {str(label)[:50]!r}", hint=_FORM)
    if not _is_id(name):
        raise DataError(f"an id is a text of at most {MAX_ID_CHARS} characters", hint=_FORM)
    if window is None and (label is None or name == ""):
        raise DataError("neither a window, nor an id and its label", hint=_FORM)
    split = plain.get("split")
    if split is not None and (split not in _SPLITS or window is None or label is None):
        raise DataError('"split" is "train" or "val", of a window with its label', hint=_FORM)
    return Item(None if window is None else as_window(window), label, str(name), split)


def _is_id(name: Any) -> bool:
    """JSON can spell half of a surrogate pair, which no stream that answers go to can carry."""
    return (
        isinstance(name, str | int)
        and len(str(name)) <= MAX_ID_CHARS
        and not any("\ud800" <= character <= "\udfff" for character in str(name))
    )


def read_payload(data: bytes) -> Item:
    """Reads one message: a JSON object, or a window as a `.npy` file has it.

    Raises:
        DataError: as `read_item`, or not a `.npy` file of numbers.
    """
    if not data.startswith(_NPY_MAGIC):
        return read_item(data)
    if len(data) > MAX_LINE_BYTES:
        raise DataError("a message is too long", size_bytes=len(data), limit_bytes=MAX_LINE_BYTES)
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        reader = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = reader(stream)
        rest = memoryview(data)[stream.tell() :]
        # What the header says is compared with what came before anything of that size is made.
        if dtype.kind not in "fiu" or math.prod(shape) * dtype.itemsize != len(rest) or not len(rest):
            raise DataError(f"a .npy message says {dtype} {list(shape)} and holds {len(rest)} bytes"[:300])
        window = np.frombuffer(rest, dtype).reshape(shape, order="F" if is_fortran else "C")
    except (ValueError, OverflowError, SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"not a .npy file of numbers: {error}"[:300]) from error
    return Item(_as_floats(window))


def as_window(values: Any) -> Floats:
    """Nested lists of numbers as float32.

    Raises:
        DataError: ragged, or not numbers.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError("a window's rows have different lengths") from error
    if array.dtype.kind not in "fiu" or not array.size:
        raise DataError("a window holds something that is not a number")
    return _as_floats(array)


def _as_floats(array: Any) -> Floats:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which the model refuses
        return np.asarray(array, np.float32)


def answer_item(agent: Answering, item: Item) -> dict[str, Any]:
    """Lets an agent handle one item and gives the answer as plain values.

    Returns:
        `id`, `label`, `name`, `score`, `scores`, `release` for a window, and `kept` (false) where its label
        could not be stored: a full disk costs no answer; `id`, `accepted` (true) for a label alone.

    Raises:
        DataError: a window or label that does not fit the model, or a label for a window that is not remembered.
        ModelError: there is no model, or it failed.
        StorageError: a label for a window of before could not be stored.
    """
    if item.window is None:
        if not agent.feedback(item.id, item.label or 0):
            raise DataError(
                f"no answered window {item.id!r} is remembered",
                hint="label a window once, while it is one of the last that were answered (inference.recent_windows)",
            )
        return {"id": item.id, "accepted": True}
    answer = agent.infer(item.window, sample_id=item.id)
    kept = True
    if item.label is not None:
        try:
            agent.observe(item.window, item.label, item.split)
        except StorageError:
            kept = False
    plain: dict[str, Any] = {
        "id": answer.sample_id,
        "label": answer.label,
        "name": answer.name,
        "score": round(float(answer.scores.max()), 6),
        "scores": [round(float(score), 6) for score in answer.scores],
        "release": answer.release_version,
    }
    return plain if kept else {**plain, "kept": False}


def answer_error(error: ShoalError, name: str = "") -> dict[str, Any]:
    """The answer to an item that could not be used."""
    plain = {"id": name, "error": str(error)}
    return {**plain, "hint": error.hint} if error.hint else plain
