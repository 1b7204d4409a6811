"""Tokens: how many devices each was for, and when a spent one was claimed again; devices: by which they came."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tokens", sa.Column("uses", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("tokens", sa.Column("reclaimed", sa.Double()))
    op.add_column("devices", sa.Column("token", sa.String(32), nullable=False, server_default=""))
    # Only tokens of many uses let devices wait; how many they were for was not kept.
    op.execute("UPDATE tokens SET uses = uses_left + 2 WHERE uses_left > 1 OR NOT approves")


def downgrade() -> None:
    op.drop_column("devices", "token")
    op.drop_column("tokens", "reclaimed")
    op.drop_column("tokens", "uses")
