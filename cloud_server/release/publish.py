"""From a candidate to a signed release that a ring runs: what is kept, what is signed, what is announced.

Laws of the file: a release's files and its row exist before anything is signed, and its row says `released`
only after the ring does, so that a crash in between is finished by asking again; the same question gives the
same version; every statement about a ring is in the books. Source: docs/architecture.md, "TUF layout".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cloud_server.artefacts import Artefacts
from cloud_server.audit.notary import Notary
from cloud_server.db import releases as table
from cloud_server.db.audit import append_audit
from cloud_server.db.engine import Connection, Database
from cloud_server.db.releases import CANDIDATE, HELD, RELEASED, ROLLED_BACK, ModelRow, ReleaseRow, RolloutRow
from cloud_server.release.signing_request import SigningRequest
from cloud_server.release.tuf_repository import TufRepository
from process.clock import Clock
from wire.checkpoint import Checkpoint
from wire.errors import ConfigurationError, ReleaseError
from wire.manifest import CHECKPOINT, GOLDEN_INPUTS, GOLDEN_OUTPUTS, GRAPH_FILES, MANIFEST, RELEASE, Release
from wire.messages import Announcement

if TYPE_CHECKING:  # a command that lists releases must not load the tools that make them
    from models.bundle import Bundle
    from models.candidate import Candidate

DEFAULT_RING = "stable"
_FILES = (CHECKPOINT, GOLDEN_INPUTS, GOLDEN_OUTPUTS)


class Publisher:
    """Keeps, signs and announces the releases of one fleet.

    Args:
        fence: the token of `Database.claim_writer` for the running service; None for commands and
            simulations.
        notary: signs the audit chain at each statement about a ring, and the statement carries its head; None leaves
            the chain unsigned.
    """

    def __init__(
        self,
        database: Database,
        artefacts: Artefacts,
        repository: TufRepository,
        clock: Clock,
        *,
        fence: int | None = None,
        notary: Notary | None = None,
    ) -> None:
        self._notary = notary
        self._database = database
        self._artefacts = artefacts
        self._repository = repository
        self._clock = clock
        self._fence = fence

    # ---- models ----

    def request_model(self, bundle: Bundle, *, fleet: str) -> SigningRequest:
        """What the offline targets key has to sign for `import_model`.

        Args:
            fleet: tenant and fleet, for the person who signs.
        """
        return self._repository.request_graphs(
            bundle.manifest.graphs_sha256, _graph_files(bundle), fleet=fleet
        )

    def import_model(self, bundle: Bundle, *, signed: SigningRequest | None = None) -> ModelRow:
        """Signs a model's graphs and registers it; its own parameters become a candidate release. Idempotent.

        Args:
            signed: what `request_model` gave, signed elsewhere; None signs here.

        Raises:
            ConfigurationError: (operator) the offline targets key is away.
            ReleaseError: (operator) `signed` does not fit.
        """
        manifest = bundle.manifest
        with self._database.read() as connection:
            known = table.load_model(connection, manifest.graphs_sha256)
        self._repository.add_graphs(manifest.graphs_sha256, _graph_files(bundle), signed=signed)
        if known is not None:
            return known
        self._artefacts.put_blob(bundle.checkpoint().to_bytes())
        row = ModelRow(
            graphs_sha256=manifest.graphs_sha256,
            name=manifest.model,
            manifest=manifest.to_bytes(),
            checkpoint_sha256=bundle.release.checkpoint_sha256,
            created=self._clock.now(),
        )
        with self._database.transaction(fence=self._fence) as connection:
            table.insert_model(connection, row)
            append_audit(
                connection, "model.imported", row.created, {"graphs": row.graphs_sha256, "name": row.name}
            )
        return row

    def propose_bundle(self, bundle: Bundle) -> ReleaseRow:
        """A candidate of the parameters that came with an imported bundle; the same one when asked again."""
        with self._database.read() as connection:
            for row in table.load_releases(connection):
                if row.run == "" and row.checkpoint_sha256 == bundle.release.checkpoint_sha256:
                    return row
        return self._propose(bundle.release, {name: bundle.read(name) for name in _FILES}, "", 0)

    def is_imported(self, graphs_sha256: str) -> bool:
        """Whether a model is registered."""
        with self._database.read() as connection:
            return table.load_model(connection, graphs_sha256) is not None

    def withdraw(self, graphs_sha256: str) -> None:
        """Takes back an import whose release did not come to be: the service would go on with its model.

        What was signed and stored of it stays, unlisted in the books, and is used again by the next try.

        Raises:
            StorageError: (disk) the database refused, as it does where a run or a ring uses the model already.
        """
        with self._database.transaction(fence=self._fence) as connection:
            if table.delete_model(connection, graphs_sha256):
                append_audit(connection, "model.withdrawn", self._clock.now(), {"graphs": graphs_sha256})

    # ---- candidates ----

    def propose(
        self, candidate: Candidate, *, run: str, round_number: int, metrics: Mapping[str, float]
    ) -> ReleaseRow:
        """Keeps what a round made under a version of its own; the same row when asked again for that round.

        Args:
            metrics: what is known of the candidate, all finite; devices see them.
        """
        with self._database.read() as connection:
            known = table.load_release_of(connection, run, round_number)
        if known is not None:
            return known
        draft = candidate.release(1, metrics, self._clock.now())
        files = {
            CHECKPOINT: candidate.checkpoint.to_bytes(),
            GOLDEN_INPUTS: candidate.golden_inputs,
            GOLDEN_OUTPUTS: candidate.golden_outputs,
        }
        return self._propose(draft, files, run, round_number)

    def hold(self, version: int, reason: str) -> None:
        """The gate said no: the candidate stays, unsigned, with the reason.

        Raises:
            ReleaseError: (us) there is no such candidate.
        """
        with self._database.transaction(fence=self._fence) as connection:
            row = table.load_release(connection, version)
            if row is None or row.state not in (CANDIDATE, HELD):
                raise ReleaseError(f"there is no candidate {version}", version=version)
            table.update_release(connection, version, state=HELD, reason=reason)
            if row.state == CANDIDATE:
                body = {"version": version, "reason": reason}
                append_audit(connection, "release.held", self._clock.now(), body)

    def _propose(self, draft: Release, files: Mapping[str, bytes], run: str, round_number: int) -> ReleaseRow:
        with self._database.transaction(fence=self._fence) as connection:
            version = table.next_version(connection)
            plain = {name: getattr(draft, name) for name in draft.__struct_fields__}
            release = Release(**(plain | {"version": version, "created": self._clock.now()}))
            # Before the row commits nobody knows the version, so what a dead writer left under it is
            # replaced.
            for name, data in {**files, RELEASE: release.to_bytes()}.items():
                self._artefacts.write(f"releases/{version}/{name}", data)
            self._artefacts.put_blob(files[CHECKPOINT])
            row = ReleaseRow(
                version=version,
                graphs_sha256=release.graphs_sha256,
                checkpoint_sha256=release.checkpoint_sha256,
                int8_sha256=release.int8_sha256,
                float32_sha256=release.float32_sha256,
                run=run,
                round=round_number,
                metrics=dict(release.metrics),
                created=release.created,
            )
            table.insert_release(connection, row)
        return row

    # ---- rings ----

    def publish(self, version: int, ring: str = DEFAULT_RING) -> Announcement:
        """Signs a release and points a ring at it. What was held back or rolled back goes out by the
        operator's word.

        Raises:
            ReleaseError: (operator, us) no such release, its graphs were never signed, or the ring runs a
                newer one.
        """
        self._database.check_claim()
        self._sign(version)
        serial = self._repository.set_ring(ring, version, custom=self._anchor())
        with self._database.transaction(fence=self._fence) as connection:
            table.update_release(connection, version, state=RELEASED, reason="")
            self._note_rollout(connection, ring, serial, version, rollback=False, reason="")
        self._anchor()
        return self.announcement(ring)

    def rollback(self, ring: str = DEFAULT_RING, *, version: int = 0, reason: str = "") -> Announcement:
        """Takes a ring back to an older release, by a newer signed statement.

        Args:
            version: where to; 0 for what the ring ran before its present release.

        Raises:
            ConfigurationError: (operator) the ring was never set, has nothing before, or the version is not older.
        """
        current, _ = self._repository.ring(ring)
        with self._database.read() as connection:
            rows = table.load_rollouts(connection, ring)
        target = version or next(
            (row.previous_version for row in rows[::-1] if row.release_version == current), 0
        )
        if not 0 < target < current:
            raise ConfigurationError(
                f"ring {ring} runs release {current} and cannot go back to {target or 'nothing'}",
                hint="`shoal-cloud release list` shows what there is",
                current=current,
            )
        self._database.check_claim()
        self._sign(target)
        serial = self._repository.set_ring(ring, target, rollback=True, custom=self._anchor())
        with self._database.transaction(fence=self._fence) as connection:
            table.update_release(connection, current, state=ROLLED_BACK, reason=reason)
            self._note_rollout(connection, ring, serial, target, rollback=True, reason=reason)
        self._anchor()
        return self.announcement(ring)

    def announcement(self, ring: str = DEFAULT_RING) -> Announcement:
        """What to tell the fleet about a ring now; `release_version` 0 where it was never set."""
        version, _ = self._repository.ring(ring)
        return Announcement(
            channel=ring,
            release_version=version,
            timestamp=self._repository.timestamp(),
            keys_version=self._repository.keys_version(),
        )

    def timestamp(self) -> bytes:
        """The newest signed `timestamp.json`; another one whenever anything was signed.

        Raises:
            StorageError: (disk) the store cannot be read.
        """
        return self._repository.timestamp()

    def current_version(self, ring: str = DEFAULT_RING) -> int:
        """The release that a ring runs; 0 where it was never set."""
        return self._repository.ring(ring)[0]

    def checkpoint(self, version: int) -> Checkpoint:
        """The parameters of a release or candidate.

        Raises:
            ReleaseError: (disk) there is no such release, or its file is missing.
        """
        return Checkpoint.from_bytes(self._file(version, CHECKPOINT))

    def _anchor(self) -> Mapping[str, Any] | None:
        return None if self._notary is None else self._notary.anchor()

    def _sign(self, version: int) -> None:
        """Makes sure that the signed repository lists a release (old ones leave it in time)."""
        with self._database.read() as connection:
            if table.load_release(connection, version) is None:
                raise ReleaseError(f"there is no release {version}", version=version)
        release = Release.from_bytes(self._file(version, RELEASE))
        self._repository.add_release(release, {name: self._file(version, name) for name in _FILES})

    def _file(self, version: int, name: str) -> bytes:
        data = self._artefacts.read(f"releases/{version}/{name}")
        if data is None:
            raise ReleaseError(f"the file {name} of release {version} is missing", hint="restore artefacts/")
        return data

    def _note_rollout(
        self, connection: Connection, ring: str, serial: int, version: int, *, rollback: bool, reason: str
    ) -> None:
        """Writes a statement into the books, unless it stands there already (asked twice after a crash)."""
        rows = table.load_rollouts(connection, ring)
        if rows and rows[-1].serial >= serial:
            return
        now = self._clock.now()
        row = RolloutRow(
            ring=ring,
            serial=serial,
            release_version=version,
            previous_version=rows[-1].release_version if rows else 0,
            rollback=rollback,
            reason=reason,
            created=now,
        )
        table.insert_rollout(connection, row)
        body = {"ring": ring, "serial": serial, "version": version, "reason": reason}
        append_audit(connection, "ring.rolled_back" if rollback else "ring.set", now, body)


def _graph_files(bundle: Bundle) -> dict[str, bytes]:
    return {name: bundle.read(name) for name in GRAPH_FILES} | {MANIFEST: bundle.manifest.to_bytes()}
