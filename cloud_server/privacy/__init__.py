"""Differential privacy: what a round costs, what may still be spent, and the noise. One thing a file."""
