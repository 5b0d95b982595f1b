"""Checks that two networks compute the same outputs."""
