"""Data sets of the demo, the simulation and the bench: one file each, with its splits and its licence."""
