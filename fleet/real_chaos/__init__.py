"""Real processes under real faults: what `shoal-fleet chaos --real` plays (docs/how-to/chaos.md)."""
