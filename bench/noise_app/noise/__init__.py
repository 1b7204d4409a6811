"""A stock Flower app: clients add noise to the arrays, the server averages them with FedAvg."""
