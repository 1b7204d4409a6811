"""How many updates were stored, and how many of them are in a backup."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_COLUMNS = ("update_number", "durable_number")


def upgrade() -> None:
    for name in _COLUMNS:
        op.add_column("meta", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    for name in reversed(_COLUMNS):
        op.drop_column("meta", name)
