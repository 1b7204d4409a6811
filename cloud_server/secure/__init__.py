"""Secure aggregation on the side of the cloud: how a masked round is laid out, gathered, and unmasked."""
