"""The link of a device: when it may be used, what it may cost, and what passes in any case."""
