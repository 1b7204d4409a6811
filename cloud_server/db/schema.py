"""Every table of the aggregator, as SQLAlchemy Core.

Laws of the file: tables only, no queries (those stand in the other files of this folder, one per group of
tables); a change here comes with a migration in `migrations/versions/`, and a test proves that both give the
same schema. Times are unix seconds (UTC). Digests, message ids and key ids are lower-case hex text, so that
they sort as their bytes do and can be read in any SQL shell. States are words; the words a column may hold
stand beside it.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

FORMAT = 1
HEAD = "0010"
"""The newest migration, which these tables are."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Id = String(64)
Digest = String(64)
MessageId = String(32)
KeyId = String(16)


class Unsigned64(TypeDecorator[int]):
    """0 … 2**64 − 1 in a signed 64-bit column (two's complement). For equality: SQL orders it wrongly."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        if value is None:
            return None
        return value - (1 << 64) if value >= 1 << 63 else value

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else value & ((1 << 64) - 1)


# ---- the database itself -----------------------------------------------------------------------------------

meta = Table(
    "meta",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # always 1: the table has one row
    Column("format", Integer, nullable=False),
    Column("incarnation", Integer, nullable=False),  # goes up when the cloud is restored from a backup
    Column(
        "devices_version", BigInteger, nullable=False
    ),  # goes up with every change of devices or their keys
    # Releases are numbered above this: a restored cloud must not give a number a second time.
    Column("release_floor", BigInteger, nullable=False, server_default="0"),
    # Updates that were stored, in all; and up to which of them a backup holds every one.
    Column("update_number", BigInteger, nullable=False, server_default="0"),
    Column("durable_number", BigInteger, nullable=False, server_default="0"),
)

# One row; the process that last raised `token` is the only one whose round transactions commit.
fencing = Table(
    "fencing",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("token", BigInteger, nullable=False),
    # Moves while that process lives; a standby takes over when it stood still for `lease_seconds` (0: at once).
    Column("beat", BigInteger, nullable=False, server_default="0"),
    Column("lease_seconds", Double, nullable=False, server_default="0"),
)

# ---- devices and trust -------------------------------------------------------------------------------------

devices = Table(
    "devices",
    metadata,
    Column("device", Id, primary_key=True),
    Column("node_id", BigInteger, nullable=False, unique=True),  # Flower's node id: 1 … 2**63 − 1
    Column("pseudonym", String(32), nullable=False, unique=True),  # what audit and ledgers say; erasable here
    Column("label", String(128), nullable=False, default=""),  # for people; `device rename` changes this
    Column("status", String(16), nullable=False),  # approved | quarantined | revoked
    Column("reason", Text, nullable=False, default=""),  # why it is not approved
    Column("update_key", Digest, nullable=False),  # raw Ed25519 public key of the newest row of device_keys
    Column("certificate_serial", String(40), nullable=False),
    Column("certificate_not_after", Double, nullable=False),
    Column("enrolled_at", Double, nullable=False),
    Column("max_examples", BigInteger, nullable=False),  # cap of num_examples in one update
    Column("strikes", Integer, nullable=False, default=0),
    Column("ring", Id, nullable=False),
    # The enrolment token that let it in; empty for one that came without.
    Column("token", MessageId, nullable=False, default="", server_default=""),
    Column("struck_at", Double, nullable=False, default=0.0, server_default="0"),  # last strike; 0: never
    # When a device that its strikes quarantined is let back by itself; 0: only by the operator.
    Column("probation_at", Double, nullable=False, default=0.0, server_default="0"),
    # meta.devices_version as of the last change of the row or its keys
    Column("changed", BigInteger, nullable=False, default=0, server_default="0", index=True),
)

device_keys = Table(
    "device_keys",
    metadata,
    Column("key_id", KeyId, primary_key=True),
    Column("device", Id, ForeignKey("devices.device"), nullable=False, index=True),
    Column("public", Digest, nullable=False),
    Column("since", Double, nullable=False),
    Column("until", Double),  # null: in use
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(40), primary_key=True),  # hex
    Column("device", Id, ForeignKey("devices.device"), nullable=False, index=True),
    Column("issued", Double, nullable=False),
    Column("not_after", Double, nullable=False),
    Column("revoked", Double),  # null: not revoked
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", MessageId, primary_key=True),
    Column("secret_hash", Digest, nullable=False),
    Column("name", Id, nullable=False, default=""),  # the name it enrols; `cam-*`: those; empty: any free one
    Column("uses_left", Integer, nullable=False),
    Column("approves", Boolean, nullable=False),  # false: who enrols with it waits in quarantine for approval
    Column("claimed_by", Id, nullable=False, default=""),  # the last device that it enrolled
    Column("expires", Double, nullable=False),
    Column("created", Double, nullable=False),
    Column("uses", Integer, nullable=False, default=1, server_default="1"),  # devices that it was made for
    Column("reclaimed", Double),  # when a spent one was claimed by somebody else; null: never
)

presence = Table(
    "presence",
    metadata,
    Column("device", Id, ForeignKey("devices.device"), primary_key=True),
    Column("status", String(16), nullable=False),  # online | offline | lost
    Column("boot_id", MessageId, nullable=False),
    Column("release_version", BigInteger, nullable=False, default=0),
    Column("agent_version", String(64), nullable=False, default=""),
    Column("last_seen", Double, nullable=False),
)

# The replay window of one device and message type; moved in the transaction that stores the message.
windows = Table(
    "windows",
    metadata,
    Column("device", Id, ForeignKey("devices.device"), primary_key=True),
    Column("type", String(16), primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("highest", BigInteger, nullable=False),
    Column("bitmap", Unsigned64, nullable=False),
)

# ---- learning ----------------------------------------------------------------------------------------------

models = Table(
    "models",
    metadata,
    Column("graphs_sha256", Digest, primary_key=True),
    Column("name", String(64), nullable=False),
    Column("manifest", LargeBinary, nullable=False),  # manifest.json as it was signed: its hash is the key
    Column("checkpoint_sha256", Digest, nullable=False),  # the bundle's own parameters: head of a new run
    Column("created", Double, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("run", Id, primary_key=True),
    Column("created", Double, nullable=False),
    Column("graphs_sha256", Digest, ForeignKey("models.graphs_sha256"), nullable=False),
    Column("config", JSON, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),  # active | paused | finished | exhausted
)

rounds = Table(
    "rounds",
    metadata,
    Column("run", Id, ForeignKey("runs.run"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),  # training | folding | evaluating | deciding | done | failed
    Column("base_sha256", Digest, nullable=False),  # the checkpoint that the cohort trains on
    Column("head_sha256", Digest),  # the checkpoint that came out of it
    Column("deadline", Double, nullable=False),
    Column("config", JSON, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("node_ids", JSON, nullable=False),  # the cohort, in the order in which it was drawn
    Column("started", Double, nullable=False),
    Column("ended", Double),
    Column("metrics", JSON, nullable=False, default=dict),
    Column("reason", Text, nullable=False, default=""),
)

orders = Table(
    "orders",
    metadata,
    Column("order_id", MessageId, primary_key=True),
    Column("run", Id, nullable=False),
    Column("round", Integer, nullable=False),
    Column("device", Id, ForeignKey("devices.device"), nullable=False),
    Column("kind", String(16), nullable=False),  # train | evaluate
    # committed | sent | accepted | declined | answered | expired
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("head_sha256", Digest, nullable=False),
    Column("overrides", JSON, nullable=False, default=dict),
    Column("deadline", Double, nullable=False),
    Column("created", Double, nullable=False),
    Column("ended", Double),
    ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.number"]),
    Index("ix_orders_run_round_kind", "run", "round", "kind"),
    Index("ix_orders_device", "device"),
)

# Raw replies (updates and evaluations) until their round commits; then only what happened to them.
updates = Table(
    "updates",
    metadata,
    Column("update_id", MessageId, primary_key=True),
    Column("order_id", MessageId, nullable=False),
    Column("run", Id, nullable=False),
    Column("round", Integer, nullable=False),
    Column("device", Id, ForeignKey("devices.device"), nullable=False),
    Column("kind", String(16), nullable=False),  # train | evaluate
    Column("num_examples", BigInteger, nullable=False),
    Column("codec", String(8), nullable=False, default=""),
    Column("metrics", JSON, nullable=False, default=dict),
    Column("body", LargeBinary),  # the opened body (canonical CBOR), or …
    Column("artefact_key", String(256)),  # … where it lies, when it is large
    Column("body_sha256", Digest, nullable=False),
    Column("transfer_sha256", Digest, nullable=False),  # of the sealed message, as the receipt names it
    Column("size_bytes", BigInteger, nullable=False),  # of the sealed message
    Column("state", String(16), nullable=False),  # stored | folded | refused | late | discarded
    Column("reason", Text, nullable=False, default=""),
    Column("received_at", Double, nullable=False),
    # L2 norm of an update as it came, before it was clipped; 0 for an evaluation and for what was refused.
    Column("norm", Double, nullable=False, default=0.0, server_default="0"),
    Index("ix_updates_run_round_kind", "run", "round", "kind"),
    Index("ix_updates_order_id", "order_id"),
    Index("ix_updates_device_received_at", "device", "received_at"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("run", Id, ForeignKey("runs.run"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),  # 0: what the run began with
    Column("sha256", Digest, primary_key=True),
    Column("artefact_key", String(256), nullable=False),
    Column("created", Double, nullable=False),
    # Of a run's newest head alone: the head that its patch is made on, the patch, and what it left out.
    Column("base_sha256", Digest),
    Column("patch_key", String(256)),
    Column("residual_key", String(256)),
    Index("ix_checkpoints_sha256", "sha256"),
)

# What a strategy carries from round to round (moments, control variates), by name; arrays as bytes, never
# pickled.
strategy_state = Table(
    "strategy_state",
    metadata,
    Column("run", Id, ForeignKey("runs.run"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),  # the state after this round
    Column("name", String(64), primary_key=True),
    Column("blob", LargeBinary, nullable=False),
)

# ---- releases ----------------------------------------------------------------------------------------------

releases = Table(
    "releases",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("graphs_sha256", Digest, ForeignKey("models.graphs_sha256"), nullable=False),
    Column("checkpoint_sha256", Digest, nullable=False),
    Column("int8_sha256", Digest, nullable=False),
    Column("float32_sha256", Digest, nullable=False),
    Column("run", Id, nullable=False, default=""),
    Column("round", Integer, nullable=False, default=0),
    Column("metrics", JSON, nullable=False, default=dict),
    Column("state", String(16), nullable=False),  # candidate | held | released | rolled_back
    Column("reason", Text, nullable=False, default=""),
    Column("created", Double, nullable=False),
)

# One row per signed statement about a ring.
rollouts = Table(
    "rollouts",
    metadata,
    Column("ring", Id, primary_key=True),
    Column("serial", BigInteger, primary_key=True, autoincrement=False),
    Column("release_version", BigInteger, ForeignKey("releases.version"), nullable=False),
    Column("previous_version", BigInteger, nullable=False, default=0),  # 0: the ring was empty
    Column("rollback", Boolean, nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("created", Double, nullable=False),
)

# ---- the books ---------------------------------------------------------------------------------------------

audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("prev", Digest, nullable=False),
    Column("hash", Digest, nullable=False),
    Column("at", Double, nullable=False),
    Column("kind", String(64), nullable=False),
    Column("body", Text, nullable=False),  # canonical JSON, exactly as it was hashed
    UniqueConstraint("hash"),
)

# What the audit key signed: how long the chain was, and with which hash it ended.
audit_heads = Table(
    "audit_heads",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", Digest, nullable=False),
    Column("at", Double, nullable=False),
    Column("incarnation", Integer, nullable=False),
    Column("key_id", KeyId, nullable=False),
    Column("signature", String(128), nullable=False),
    Column("witnessed", Double),  # null: the external witness does not have it yet
)

# What each private round was charged; append-only, chained and signed.
privacy_ledger = Table(
    "privacy_ledger",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("run", Id, nullable=False),
    Column("round", Integer, nullable=False),
    Column("mode", String(16), nullable=False),  # central | distributed | restored
    Column("noise_multiplier", Double, nullable=False),
    Column("clipping_norm", Double, nullable=False),
    Column("sampling_rate", Double, nullable=False),
    Column("population", BigInteger, nullable=False),
    Column("cohort", BigInteger, nullable=False),
    Column("epsilon", Double, nullable=False),
    Column("delta", Double, nullable=False),
    Column("secret_sha256", Digest, nullable=False),
    Column("at", Double, nullable=False),
    Column("prev", Digest, nullable=False),
    Column("hash", Digest, nullable=False),
    Column("key_id", KeyId, nullable=False),
    Column("signature", String(128), nullable=False),
    UniqueConstraint("run", "round"),
)

# What cohort and noise of a round come from; a row ends with its round.
privacy_secrets = Table(
    "privacy_secrets",
    metadata,
    Column("run", Id, primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("secret", LargeBinary, nullable=False),
)

# ---- a stock ServerApp --------------------------------------------------------------------------------------

# What the app asked of its grid and was told; a row is there before the app knows. Gone with the end of its run.
grid_steps = Table(
    "grid_steps",
    metadata,
    Column("run", Id, primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),  # from 1
    Column("kind", String(16), nullable=False),  # begin | nodes | push | pull
    Column("asked", JSON, nullable=False),
    Column("answer", JSON, nullable=False),
    Column("at", Double, nullable=False),
)

# ---- people ------------------------------------------------------------------------------------------------

operators = Table(
    "operators",
    metadata,
    Column("name", Id, primary_key=True),
    Column("role", String(16), nullable=False),  # viewer | operator | admin
    Column("pseudonym", String(32), nullable=False, unique=True),  # what the audit chain says
    Column("token_hash", Digest, nullable=False, unique=True),
    Column("created", Double, nullable=False),
    Column("last_seen", Double, nullable=False, default=0.0),
)
