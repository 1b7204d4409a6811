"""A device's part of a round: the head, the training, the masks."""
