"""Compute the outputs of a network, by the fastest engine that is right; export it."""
