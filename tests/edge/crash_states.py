"""Every state that a disk can be in after a power cut while releases are swapped, from the real code's system calls.

strace records what the code asks of the system; a model of a disk that keeps only what was synced then gives, for each
moment, the states that a cut may leave: of names that were not synced any prefix, all but one, or one alone; of bytes
that were not synced all, half, or none. (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.)

`python -m tests.edge.crash_states FOLDER ACT` is what is recorded: the act alone, in a folder that is prepared.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.edge.crash_swap import act, prepare

ROOT = Path(__file__).resolve().parents[2]
CALLS = (
    "openat,write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,"
    "rmdir,link,linkat,symlink,symlinkat"
)
_LINE = re.compile(r"^\d+ +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_OPENED = re.compile(r"(?:^|, )(?:AT_FDCWD|\d+)<((?:\\x[0-9a-f]{2})*)>")


@dataclass
class Node:
    """A file or a folder, whatever its name is at the moment."""

    names: dict[str, Node] | None = None
    data: bytes = b""
    synced: bytes = b""


@dataclass(frozen=True)
class Naming:
    """One change of names: `node` leaves `before` and gets `after`; None for a new or an unlinked one."""

    node: Node
    before: tuple[Node, str] | None
    after: tuple[Node, str] | None


@dataclass
class Disk:
    """What the code sees, and what of it a cut leaves.

    Attributes:
        root: as the code sees it.
        durable: for each folder, the names that a cut leaves.
        pending: changes of names that were not synced, oldest first.
    """

    root: Node
    durable: dict[int, dict[str, Node]] = field(default_factory=dict)
    pending: list[Naming] = field(default_factory=list)
    folders: dict[int, Node] = field(default_factory=dict)
    unsynced: dict[int, Node] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Disk:
        """All that is there, synced."""
        disk = cls(Node({}))

        def read(place: Path) -> Node:
            if not place.is_dir():
                data = place.read_bytes()
                return Node(None, data, data)
            node = Node({path.name: read(path) for path in place.iterdir()})
            disk._know(node)
            return node

        disk.root = read(folder)
        return disk

    def _know(self, node: Node) -> None:
        self.folders[id(node)] = node
        self.durable[id(node)] = dict(node.names or {})

    # ---- what the code does ----

    def find(self, path: str) -> Node | None:
        node: Node | None = self.root
        for name in [part for part in path.split("/") if part]:
            node = (node.names or {}).get(name) if node is not None else None
        return node

    def place(self, path: str) -> tuple[Node, str]:
        parent, _, name = path.rpartition("/")
        node = self.find(parent)
        assert node is not None, path
        return node, name

    def rename(self, source: str | None, target: str | None, made: Node | None = None) -> None:
        """A new name, another one, or none."""
        before = self.place(source) if source is not None else None
        after = self.place(target) if target is not None else None
        node = made if made is not None else (before[0].names or {})[before[1]] if before else None
        assert node is not None
        for place, value in ((before, None), (after, node)):
            if place is not None and place[0].names is not None:
                place[0].names.pop(place[1], None)
                if value is not None:
                    place[0].names[place[1]] = value
        self.pending.append(Naming(node, before, after))

    def make(self, path: str, *, is_folder: bool) -> Node:
        node = Node({} if is_folder else None)
        if is_folder:
            self._know(node)
        self.rename(None, path, node)
        return node

    def write(self, node: Node, data: bytes) -> None:
        node.data = data
        self.unsynced[id(node)] = node

    def sync(self, node: Node) -> None:
        if node.names is None:
            node.synced = node.data
            self.unsynced.pop(id(node), None)
            return
        left = []
        for change in self.pending:
            touched = [place[0] for place in (change.before, change.after) if place is not None]
            if any(each is node for each in touched):
                _apply(self.durable, change)
            else:
                left.append(change)
        self.pending = left

    # ---- what a cut leaves ----

    def states(self) -> Iterator[dict[str, bytes | None]]:
        """Path to content, None for a folder."""
        for kept in _choices(len(self.pending)):
            names = {number: dict(each) for number, each in self.durable.items()}
            for index in kept:
                _apply(names, self.pending[index])
            for share in (1.0, 0.5, 0.0) if self.unsynced else (1.0,):
                yield dict(self._walk(self.root, "", names, share))

    def _walk(
        self, node: Node, path: str, names: dict[int, dict[str, Node]], share: float
    ) -> Iterator[tuple[str, bytes | None]]:
        for name, inner in sorted(names[id(node)].items()):
            place = f"{path}/{name}"
            if inner.names is not None:
                yield place, None
                yield from self._walk(inner, place, names, share)
            elif id(inner) in self.unsynced:
                yield place, inner.data[: int(len(inner.data) * share)]
            else:
                yield place, inner.data


def _apply(names: dict[int, dict[str, Node]], change: Naming) -> None:
    if change.before is not None:
        folder, name = names[id(change.before[0])], change.before[1]
        if folder.get(name) is change.node:
            del folder[name]
    if change.after is not None:
        names[id(change.after[0])][change.after[1]] = change.node


def _choices(count: int) -> Iterator[tuple[int, ...]]:
    everything = tuple(range(count))
    for length in range(count + 1):
        yield everything[:length]
    for index in everything:
        yield everything[:index] + everything[index + 1 :]
        yield (index,)


# ---- from system calls to states ----------------------------------------------------------------------------


def record(folder: Path, what: str) -> list[str]:
    """Prepares a folder, and records the act on it; the lines of strace."""
    prepare(folder)
    out = folder.with_suffix(".strace")
    command = ["strace", "-f", "-y", "-xx", "-s", "1000000", "-e", f"trace={CALLS}", "-o", str(out)]
    child = [sys.executable, "-m", "tests.edge.crash_states", str(folder), what]
    subprocess.run([*command, *child], cwd=ROOT, check=True, timeout=300)
    return out.read_text().splitlines()


def crash_states(before: Path, folder: Path, lines: list[str]) -> Iterator[dict[str, bytes | None]]:
    """Every state that a cut at any moment may leave, each once.

    Args:
        before: a copy of the folder as it was.
        folder: what the lines speak of.
    """
    disk, seen = Disk.of(before), set[str]()
    for line in ["", *lines]:
        if line and not _replay(disk, line, f"{folder}/"):
            continue
        for state in disk.states():
            name = hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()
            if name not in seen:
                seen.add(name)
                yield state


def _replay(disk: Disk, line: str, folder: str) -> bool:
    """Does what one system call did; False when it changed nothing here."""
    found = _LINE.match(line)
    if found is None or int(found["result"]) < 0:
        return False
    call, arguments = found["call"], found["arguments"]
    opened = [_plain(text) for text in _OPENED.findall(arguments)]
    given = [_plain(text) for text in _TEXT.findall(arguments)]
    if call in ("write", "fsync", "fdatasync"):
        if not opened or not opened[0].decode(errors="replace").startswith(folder):
            return False
        node = disk.find(opened[0].decode().removeprefix(folder))
        if node is None:
            return False  # a file that has no name any more
        if call == "write":
            disk.write(node, node.data + given[0])
        else:
            disk.sync(node)
        return True
    bases = [base.decode(errors="replace") for base in opened] or [""]
    paths = [_join(bases[min(index, len(bases) - 1)], text.decode()) for index, text in enumerate(given)]
    if not paths or not paths[0].startswith(folder):
        return False
    inside = [path.removeprefix(folder) for path in paths]
    return _rename(disk, call, arguments, inside)


def _rename(disk: Disk, call: str, arguments: str, inside: list[str]) -> bool:
    if call == "openat":
        known = disk.find(inside[0])
        if known is None and "O_CREAT" in arguments:
            disk.make(inside[0], is_folder=False)
        elif known is not None and "O_TRUNC" in arguments:
            disk.write(known, b"")
        else:
            return False
    elif call in ("mkdir", "mkdirat"):
        disk.make(inside[0], is_folder=True)
    elif call in ("rename", "renameat", "renameat2"):
        disk.rename(inside[0], inside[1])
    elif call in ("unlink", "unlinkat", "rmdir"):
        disk.rename(inside[0], None)
    else:
        raise AssertionError(f"the model knows no {call}")
    return True


def _plain(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _join(base: str, path: str) -> str:
    return path if path.startswith("/") else f"{base}/{path}"


def lay_down(state: dict[str, bytes | None], folder: Path) -> None:
    """Makes a state real."""
    folder.mkdir()
    for path, data in state.items():
        place = folder / path.lstrip("/")
        if data is None:
            place.mkdir()
        else:
            place.write_bytes(data)


if __name__ == "__main__":
    act(Path(sys.argv[1]), sys.argv[2])
