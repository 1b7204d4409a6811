"""The privacy ledger and the secrets of open rounds in SQL.

Laws of the file: charges are only ever appended, and no statement here changes or removes one; a round's secret is
there from the transaction that charges the round to the one that ends it, and nowhere else. Source:
docs/architecture.md (Differential privacy).
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import meta, privacy_ledger, privacy_secrets, rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class ChargeRow:
    """What one round was charged.

    Attributes:
        seq: counts from 1 over all runs of the fleet.
        mode: how the noise is made: `central`, `distributed`; or `restored`, for a round that a backup does not know.
        population: the devices that the cohort was drawn from; `cohort` how many were.
        epsilon: what all rounds up to this one have spent at `delta`.
        secret_sha256: SHA-256 (hex) of the secret that cohort and noise come from.
        prev: hash of the charge before.
        key_id, signature: who signed `hash`, hex.
    """

    seq: int
    run: str
    round: int
    mode: str
    noise_multiplier: float
    clipping_norm: float
    sampling_rate: float
    population: int
    cohort: int
    epsilon: float
    delta: float
    secret_sha256: str
    at: float
    prev: str
    hash: str
    key_id: str
    signature: str


def insert_charge(connection: Connection, row: ChargeRow) -> None:
    """Appends a charge."""
    values = {name: getattr(row, name) for name in ChargeRow.__slots__}
    connection.execute(sa.insert(privacy_ledger).values(**values))


def last_charge(connection: Connection) -> tuple[int, str] | None:
    """Number and hash of the newest charge, in a transaction that will append the next; None for an empty ledger."""
    # Two writers of one PostgreSQL queue up at a row that is always there (SQLite has one writer anyway).
    connection.execute(sa.select(meta.c.id).with_for_update())
    table = privacy_ledger
    newest = sa.select(table.c.seq, table.c.hash).order_by(table.c.seq.desc()).limit(1)
    row = connection.execute(newest).one_or_none()
    return None if row is None else (int(row.seq), str(row.hash))


def load_charges(connection: Connection, *, last: int = 0) -> list[ChargeRow]:
    """The charges, oldest first; only the `last` so many if given."""
    query = sa.select(privacy_ledger).order_by(privacy_ledger.c.seq.desc())
    found = connection.execute(query.limit(last) if last else query)
    return [ChargeRow(**row._mapping) for row in found][::-1]


def load_charge(connection: Connection, run: str, round_number: int) -> ChargeRow | None:
    """The charge of one round."""
    table = privacy_ledger
    where = (table.c.run == run) & (table.c.round == round_number)
    row = connection.execute(sa.select(table).where(where)).one_or_none()
    return None if row is None else ChargeRow(**row._mapping)


def count_mechanisms(connection: Connection) -> list[tuple[float, float, str, int]]:
    """(noise multiplier, sampling rate, mode, how many rounds) of all charges."""
    table = privacy_ledger
    columns = (table.c.noise_multiplier, table.c.sampling_rate, table.c.mode)
    query = sa.select(*columns, sa.func.count()).group_by(*columns).order_by(*columns)
    return [(row[0], row[1], row[2], int(row[3])) for row in connection.execute(query)]


# ---- secrets -----------------------------------------------------------------------------------------------


def insert_secret(connection: Connection, run: str, round_number: int, secret: bytes) -> None:
    """Commits what a round's cohort and noise come from."""
    values = {"run": run, "round": round_number, "secret": secret}
    connection.execute(sa.insert(privacy_secrets).values(**values))


def load_secret(connection: Connection, run: str, round_number: int) -> bytes | None:
    """The secret of a round that is under way; None once it ended."""
    table = privacy_secrets
    query = sa.select(table.c.secret).where((table.c.run == run) & (table.c.round == round_number))
    found = connection.execute(query).scalar_one_or_none()
    return None if found is None else bytes(found)


def delete_secret(connection: Connection, run: str, round_number: int) -> None:
    """Ends it: from here on nobody can take the round's noise off again."""
    table = privacy_secrets
    connection.execute(sa.delete(table).where((table.c.run == run) & (table.c.round == round_number)))


def delete_secrets(connection: Connection) -> None:
    """Ends them all: noise that another life of the cloud may have drawn and shown is drawn for nothing else."""
    connection.execute(sa.delete(privacy_secrets))


# ---- what the ledger must agree with -----------------------------------------------------------------------


def load_private_rounds(connection: Connection) -> list[tuple[str, int, str]]:
    """(run, round, mode) of every round that says of itself that it is private."""
    query = sa.select(rounds.c.run, rounds.c.number, rounds.c.config).order_by(rounds.c.run, rounds.c.number)
    found = connection.execute(query)
    return [(row.run, row.number, row.config["privacy"]) for row in found if "privacy" in row.config]


def count_uncharged(connection: Connection) -> int:
    """How many rounds moved a head without a charge: what they told of the devices' data is not bounded."""
    table = privacy_ledger
    charged = sa.exists().where((table.c.run == rounds.c.run) & (table.c.round == rounds.c.number))
    query = sa.select(sa.func.count()).select_from(rounds)
    return int(connection.execute(query.where(rounds.c.head_sha256.is_not(None) & ~charged)).scalar_one())
