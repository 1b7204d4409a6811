"""The helper: a second server, run by another party, that knows masks and no updates (docs/protocol.md, clause 15)."""
