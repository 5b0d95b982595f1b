"""Evaluation metrics, computed from arrays."""
