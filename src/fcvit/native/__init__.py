"""Compute the network on a CPU with our own operators, compiled on the user's machine. They speed up training."""
