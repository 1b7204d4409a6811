"""The fleet under faults: the real agents and aggregator on virtual time, network and disks; a seed is a history."""
