"""Alembic's folder: the schema's history. `versions/` holds one file per change, the first one included."""
