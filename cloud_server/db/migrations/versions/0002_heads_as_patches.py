"""Heads as patches on the heads before them, and what each patch left out."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_COLUMNS = (("base_sha256", 64), ("patch_key", 256), ("residual_key", 256))


def upgrade() -> None:
    for name, length in _COLUMNS:
        op.add_column("checkpoints", sa.Column(name, sa.String(length)))


def downgrade() -> None:
    for name, _ in reversed(_COLUMNS):
        op.drop_column("checkpoints", name)
