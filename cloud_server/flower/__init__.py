"""Flower is joined here, at its `Grid`: the one door to flwr. Its telemetry is off before it is imported."""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
