"""Which devices changed since the register was read: it reads those alone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("devices", sa.Column("changed", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_devices_changed", "devices", ["changed"])


def downgrade() -> None:
    op.drop_index("ix_devices_changed", "devices")
    op.drop_column("devices", "changed")
