"""Local fleets: the demo with real processes, the simulation on a virtual clock, scenarios and reports."""
