"""Benchmarks: each file measures one thing as ratios against a baseline in one run; `python -m bench` runs all."""
