"""Alembic runs this to upgrade the database; `Database.upgrade` hands it the connection."""

from alembic import context
from grader.service.models import Base

connection = context.config.attributes["connection"]
# SQLite can alter a table only by making it anew, which is what "batch" means.
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
connection.commit()
