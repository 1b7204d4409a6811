"""The aggregator's state in SQL: the one door to sqlalchemy and alembic. One file per group of tables."""
