"""What Alembic runs for every command: migrates over the connection that `Database.migrate` hands in."""

from alembic import context

from cloud_server.db.schema import metadata

# SQLite cannot alter most of a table in place, so changes are rendered as batches (copy and rename) from the
# start.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
