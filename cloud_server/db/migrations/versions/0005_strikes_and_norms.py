"""When a device was struck and when it comes back by itself; how long updates were before they were clipped."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_COLUMNS = (("devices", "struck_at"), ("devices", "probation_at"), ("updates", "norm"))


def upgrade() -> None:
    for table, name in _COLUMNS:
        op.add_column(table, sa.Column(name, sa.Double(), nullable=False, server_default="0"))


def downgrade() -> None:
    for table, name in reversed(_COLUMNS):
        op.drop_column(table, name)
