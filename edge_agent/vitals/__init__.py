"""How an agent is: what it counts, checks, shows."""
