"""The federated round: a pure state machine, the shell that drives it, the ports that a service fills."""
