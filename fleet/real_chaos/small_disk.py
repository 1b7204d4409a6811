"""A device whose state lies on a tmpfs of 4 MB that something else fills, and an aggregator whose disk is full.

Laws of the file: the disk is really full (not a single page is left), also at a start; inference is answered all the
time; what was in the outbox is still owed and arrives when there is room again; what the outbox's own cap puts out is
counted as evicted; the aggregator acknowledges nothing that it has not kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from edge_agent.store.outbox import Outbox
from edge_agent.store.storage import open_database
from fleet.real_chaos.cloud_path import CloudPath
from fleet.real_chaos.device_path import DevicePath
from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.owing import OwingDevice, make_owed
from fleet.real_chaos.paths import Findings, workshop
from fleet.real_chaos.scenario import Scenario, Task
from fleet.real_chaos.victim import Nursery
from wire.errors import ConfigurationError
from wire.messages import Update, decode_body

DISK_BYTES: Final = 4 * 1024 * 1024
FULL_SECONDS: Final = 100.0
"""Virtual time for which the disk stays full."""
_PAGE: Final = bytes(4096)
_FILLER: Final = "filler"


@contextmanager
def small_disk(place: Path, size_bytes: int = DISK_BYTES) -> Iterator[Path]:
    """A tmpfs of its own at a folder that is made for it.

    Raises:
        ConfigurationError: (operator) this process may not mount.
    """
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "tmpfs", str(place)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        raise ConfigurationError(
            f"a small disk cannot be mounted here: {mounted.stderr.strip()}",
            hint="run it as root, or in a namespace: unshare --map-root-user --mount",
        )
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def fill(disk: Path) -> None:
    """Takes every page that is left."""
    descriptor = os.open(disk / _FILLER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        while os.write(descriptor, _PAGE) == len(_PAGE):
            continue
    except OSError:
        return
    finally:
        os.close(descriptor)


def make_room(disk: Path) -> None:
    """Gives back what `fill` took."""
    (disk / _FILLER).unlink(missing_ok=True)


def can_mount() -> bool:
    """Whether this process may have a disk of its own."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


def start_on_full_disk(device: OwingDevice, folder: Path, root: Path) -> Findings:
    """A device that owes is started on a full disk, which has room again later."""
    with small_disk(root / "disk") as disk:
        state = disk / "state"
        shutil.copytree(folder, state)
        fill(disk)
        ended = device.play(state, later=(FULL_SECONDS, lambda: make_room(disk)))
    found = ended.findings
    if ended.arrived != len(device.owed) or ended.destroyed:
        found.wrong(f"{ended.arrived} of {len(device.owed)} arrived, {ended.destroyed} were destroyed")
    return found


def fills_while_it_runs(device: OwingDevice, folder: Path, root: Path) -> Findings:
    """The disk fills while the device sends what it owes and hears receipts that it cannot keep."""
    with small_disk(root / "disk") as disk:
        state = disk / "state"
        shutil.copytree(folder, state)
        ended = device.play(state, before=lambda: fill(disk), later=(FULL_SECONDS, lambda: make_room(disk)))
    found = ended.findings
    if ended.arrived != len(device.owed) or ended.destroyed:
        found.wrong(f"{ended.arrived} of {len(device.owed)} arrived, {ended.destroyed} were destroyed")
    return found


def evicts_what_has_no_room(root: Path) -> Findings:
    """An outbox with a cap below what is put into it counts what it puts out, the oldest first."""
    found, count, fitting = Findings(), 12, 5
    owed = make_owed(count)
    cap = fitting * (len(owed[0].body) + 100)
    database = open_database(root / "evicting")
    outbox = Outbox(database, max_bytes=cap)
    for each in owed:
        body = decode_body(each.body, Update)
        outbox.put(body.update_id, body.order_id, body.run, body.round_number, "up", each.body, 1.0, 1e12)
    left = [row.update_id.hex() for row in outbox.pending()]
    evicted = outbox.totals()["evicted"]
    if left != [each.update_id for each in owed[-len(left) :]] or len(left) + evicted != count:
        found.wrong(f"{len(left)} are left and {evicted} evicted of {count}")
    found.made = count
    database.close()
    return found


def aggregator_on_full_disk(path: CloudPath, root: Path) -> Findings:
    """The aggregator's disk fills in the middle of a run and has room again later."""
    with small_disk(root / "cloud-disk", 8 * DISK_BYTES) as disk:
        return path.play(folder=disk / "state", full=(lambda: fill(disk), lambda: make_room(disk)))


def _play(task: Task) -> Outcome:
    started, struck, found = time.monotonic(), Counter[str](), Findings()
    if not can_mount():
        print("small_disk is left out: only root may mount a tmpfs", file=sys.stderr)
        return task.outcome("small_disk", found.books(), struck, started)
    task.folder.mkdir(parents=True, exist_ok=True)
    with workshop(task.bundle) as bench, Nursery("device") as nursery, Nursery("cloud") as clouds:
        device = OwingDevice(bench, nursery, DevicePath(bench, nursery))
        plays = {}
        for name, is_killed in (("stopped", False), ("killed", True)):
            device.prepare(bench.root / name, is_killed=is_killed)
            plays[f"start of a {name} device"] = (start_on_full_disk, name)
            plays[f"run of a {name} device"] = (fills_while_it_runs, name)
        results = {
            what: call(device, bench.root / name, bench.root / f"{number}")
            for number, (what, (call, name)) in enumerate(plays.items())
        }
        results["outbox at its cap"] = evicts_what_has_no_room(bench.root)
        results["aggregator"] = aggregator_on_full_disk(CloudPath(bench, clouds), bench.root)
        for number, (what, each) in enumerate(results.items(), start=1):
            struck[what] += 1
            found.add(each, what)
            task.tell(number)
    return task.outcome("small_disk", found.books(), struck, started)


SCENARIOS = (
    Scenario(
        "small_disk", "a device's and an aggregator's disk without a page left", _play, needs=("mount",)
    ),
)
