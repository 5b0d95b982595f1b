"""Compute the network on a CPU by operators of our own, compiled on the user's machine: for training."""
