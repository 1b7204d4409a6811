"""Benchmarks: each file measures one thing as ratios against a baseline in the same run; `python -m bench` runs them all."""
