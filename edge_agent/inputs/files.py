"""Windows in `.npy` and `.csv` files: one file, or a folder in which files keep appearing.

    x.npy              float [*input_shape], or [N, *input_shape]; labels beside it in x.labels.npy, int [N]
    x.val.npy          the same, kept for evaluation where labelled; x.train.npy for training
    x.csv              one window a row, flattened; a header row may name the columns `label` and `id`

A row that cannot be used is answered with an error and passed; so are labels without windows, once they have waited.

Laws of the file: no pickle; sizes are checked before anything is read; a file is taken when it has stopped
growing; files are taken in the order of their times, and the newest one taken is remembered on disk, so that
a restart goes on there.
"""

from __future__ import annotations

import csv
import math
import time
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from edge_agent.inputs.item import Answering, Answers, Item, Split, answer_error, answer_item
from process.logs import get_logger
from wire.errors import ConfigurationError, DataError, ShoalError

_log = get_logger("edge_agent.inputs")

SUFFIXES: Final = (".npy", ".csv")
LABELS_SUFFIX: Final = ".labels.npy"
MAX_FILE_BYTES: Final = 512 * 2**20
POLL_SECONDS: Final = 0.5
ORPHAN_POLLS: Final = 10
MAX_BAD_ROWS: Final = 100
MAX_REMEMBERED: Final = 4096


class Bookmark(Protocol):
    """Where a folder's last taken file is remembered (a fact of the agent's database)."""

    def read(self) -> str: ...

    def write(self, mark: str) -> None: ...


@dataclass(frozen=True, slots=True, order=True)
class _Mark:
    """A file's place in the order of taking."""

    modified_ns: int
    name: str

    @classmethod
    def parse(cls, text: str) -> _Mark:
        number, _, name = text.partition(" ")
        return cls(int(number), name) if number.isdecimal() else cls(0, "")

    def __str__(self) -> str:
        return f"{self.modified_ns} {self.name}"


def check_path(path: Path) -> None:
    """Looks whether windows can be read from a path, before anything is opened.

    Raises:
        ConfigurationError: (operator) no such path, or another kind of file.
    """
    if not path.exists():
        raise ConfigurationError(f"there is no {path} to read windows from", hint="give a file or a folder")
    if path.is_dir():
        return
    if not path.is_file():
        raise ConfigurationError(
            f"{path} is neither a file nor a folder", hint="for a stream, `--input -` reads lines of JSON"
        )
    if path.suffix not in SUFFIXES:
        raise ConfigurationError(f"{path} is neither .npy nor .csv", hint="convert it, or name a folder")


class FileInput:
    """Answers every window of one file, or of the files of a folder.

    Args:
        path: a `.npy` or `.csv` file (read once), or a folder (polled until the door closes).
        input_shape: gives the model's shape of one window.
        once: of a folder, only what lies there is taken.
        pause: waits that many seconds between polls.

    Raises:
        ConfigurationError: (operator) as `check_path`.
    """

    def __init__(
        self,
        path: Path,
        answers: Answers,
        *,
        input_shape: Callable[[], tuple[int, ...]],
        bookmark: Bookmark,
        once: bool = False,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        check_path(path)
        self._path = path
        self._once = once
        self._answers = answers
        self._input_shape = input_shape
        self._bookmark = bookmark
        self._pause = pause
        self._sizes: dict[str, int] = {}
        self._orphans: dict[str, int] = {}
        self._unlabelled: set[str] = set()

    def run(self, agent: Answering, should_stop: Callable[[], bool]) -> None:
        """Answers until the file ends, or for a folder until `should_stop`."""
        if self._path.is_file():
            self._take(agent, self._path, should_stop)
            return
        mark = _Mark.parse(self._bookmark.read())
        while not should_stop():
            for place, path in self._ready(mark):
                if should_stop():
                    return
                self._take(agent, path, should_stop)
                mark = place
                self._bookmark.write(str(mark))
            if self._once and not self._sizes:
                return
            self._pause(POLL_SECONDS)

    def _ready(self, mark: _Mark) -> list[tuple[_Mark, Path]]:
        """New files whose size did not change since the last poll, oldest first, up to one that grows."""
        found: list[tuple[_Mark, Path, int]] = []
        labels: list[Path] = []
        try:
            for path in self._path.iterdir():
                if path.name.endswith(LABELS_SUFFIX):
                    labels.append(path)
                elif path.suffix in SUFFIXES and path.is_file():
                    facts = path.stat()
                    found.append((_Mark(facts.st_mtime_ns, path.name), path, facts.st_size))
        except OSError as error:
            _log.warning("input_folder_unreadable", path=str(self._path), reason=error.strerror)
            return []
        self._watch_labels(labels)
        ready: list[tuple[_Mark, Path]] = []
        sizes: dict[str, int] = {}
        for place, path, size in sorted(found):
            if place <= mark:
                continue
            sizes[path.name] = size
            if self._sizes.get(path.name) != size:
                continue
            if len(ready) == len(sizes) - 1:
                ready.append((place, path))
        self._sizes = sizes
        return ready

    def _watch_labels(self, labels: list[Path]) -> None:
        """Labels come before or with their windows; those without windows, or too late for them, are said once."""
        waited = {}
        for path in labels:
            windows = path.with_name(path.name.removesuffix(LABELS_SUFFIX) + ".npy")
            if windows.name in self._unlabelled:
                self._unlabelled.discard(windows.name)
                error = DataError(
                    f"{path.name} came after its windows were answered", hint="write the labels first"
                )
                self._answers(answer_error(error, path.name))
            elif not windows.exists():
                waited[path.name] = self._orphans.get(path.name, 0) + 1
                if waited[path.name] == ORPHAN_POLLS:
                    error = DataError(f"there is no {windows.name} for the labels in {path.name}")
                    self._answers(answer_error(error, path.name))
        self._orphans = waited

    def _take(self, agent: Answering, path: Path, should_stop: Callable[[], bool]) -> None:
        if (
            path.suffix == ".npy"
            and not _labels_place(path).exists()
            and len(self._unlabelled) < MAX_REMEMBERED
        ):
            self._unlabelled.add(path.name)
        try:
            for item in read_items(path, self._input_shape()):
                if should_stop():
                    return
                if isinstance(item, DataError):
                    self._answers(answer_error(item, path.name))
                    continue
                try:
                    self._answers(answer_item(agent, item))
                except ShoalError as error:
                    self._answers(answer_error(error, item.id))
        except ShoalError as error:
            self._answers(answer_error(error, path.name))


def read_items(path: Path, input_shape: tuple[int, ...]) -> Iterator[Item | DataError]:
    """The windows of a file, in order, and what is wrong with rows between; ids are the file's name and the row.

    Raises:
        DataError: unreadable, too large, or not windows of this shape.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path.name} is too large", size_bytes=size, limit_bytes=MAX_FILE_BYTES)
        if path.suffix == ".npy":
            yield from _read_npy(path, input_shape)
        else:
            yield from _read_csv(path, input_shape)
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror or error}") from error


def _load(path: Path) -> np.ndarray[Any, Any]:
    try:
        return np.load(path, allow_pickle=False, mmap_mode="r")  # type: ignore[no-any-return]
    except (ValueError, EOFError, OverflowError, SyntaxError, tokenize.TokenError) as error:
        # The last two: numpy reads a header as Python's literals.
        raise DataError(f"{path.name} is not a .npy file of numbers: {error}"[:300]) from error


def _read_npy(path: Path, input_shape: tuple[int, ...]) -> Iterator[Item]:
    windows = _load(path)
    if windows.dtype.kind not in "fiu":
        raise DataError(f"{path.name} holds {windows.dtype}, not numbers")
    if windows.shape == input_shape:
        windows = windows[None]
    if windows.shape[1:] != input_shape:
        raise DataError(
            f"{path.name} holds windows of {list(windows.shape[1:])}, the model takes {list(input_shape)}",
            hint=f"save them as float32 [N, {', '.join(map(str, input_shape))}]",
        )
    labels = _labels_beside(path, len(windows))
    split = None if labels is None else _split_of(path)
    for row, window in enumerate(windows):
        label = None if labels is None else int(labels[row])
        yield Item(np.array(window, dtype=np.float32), label, f"{path.name}#{row}", split)


def _split_of(path: Path) -> Split | None:
    """What the file's name says that its labelled windows are for; None leaves it to the settings."""
    match Path(path.stem).suffix:
        case ".train":
            return "train"
        case ".val":
            return "val"
    return None


def _labels_place(windows: Path) -> Path:
    return windows.with_name(windows.stem + LABELS_SUFFIX)


def _labels_beside(path: Path, count: int) -> np.ndarray[Any, Any] | None:
    place = _labels_place(path)
    if not place.is_file():
        return None
    labels = _load(place)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"{place.name} holds {labels.dtype} {list(labels.shape)} for {count} windows",
            hint="save the labels as integers, one for each window",
        )
    return labels


def _read_csv(path: Path, input_shape: tuple[int, ...]) -> Iterator[Item | DataError]:
    size = math.prod(input_shape)
    bad_rows = 0
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        label_column = id_column = -1
        for row, cells in enumerate(csv.reader(file)):
            if not cells:
                continue
            if row == 0 and any(not _is_number(cell) for cell in cells):
                names = [cell.strip().lower() for cell in cells]
                label_column = names.index("label") if "label" in names else -1
                id_column = names.index("id") if "id" in names else -1
                continue
            try:
                yield _csv_item(path.name, row, cells, (label_column, id_column), size).shaped(input_shape)
            except DataError as error:
                yield error
                bad_rows += 1
                if bad_rows == MAX_BAD_ROWS:
                    raise DataError(f"{path.name}: too many bad rows, the rest is left out") from error


@dataclass(frozen=True, slots=True)
class _Row:
    values: list[float]
    label: int | None
    id: str

    def shaped(self, input_shape: tuple[int, ...]) -> Item:
        return Item(np.array(self.values, np.float32).reshape(input_shape), self.label, self.id)


def _csv_item(name: str, row: int, cells: list[str], columns: tuple[int, int], size: int) -> _Row:
    label_column, id_column = columns
    where = f"{name}, row {row + 1}"
    numbers = [cell for column, cell in enumerate(cells) if column not in columns]
    if len(numbers) != size:
        raise DataError(f"{where}: {len(numbers)} values, a window has {size}")
    try:
        values = [float(cell) for cell in numbers]
        text = cells[label_column].strip() if label_column >= 0 else ""
        label = int(text) if text else None
    except (ValueError, IndexError) as error:
        raise DataError(
            f"{where}: {error}"[:200], hint="numbers only, and whole numbers as labels"
        ) from error
    return _Row(values, label, cells[id_column].strip() if 0 <= id_column < len(cells) else f"{name}#{row}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
