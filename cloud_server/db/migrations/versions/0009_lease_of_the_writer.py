"""How long whoever writes may be silent before a standby takes over, and its beat."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("fencing", sa.Column("beat", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("fencing", sa.Column("lease_seconds", sa.Double(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("fencing", "lease_seconds")
    op.drop_column("fencing", "beat")
