"""Compute the outputs of a network with the fastest engine that passes the numerical check, and export networks."""
