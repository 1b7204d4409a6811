"""What a device keeps: its database, its samples and its outbox, sealed, mended and forgotten."""
