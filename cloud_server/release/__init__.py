"""From a checkpoint to what devices may run: the gate, the signed repository, publication."""
