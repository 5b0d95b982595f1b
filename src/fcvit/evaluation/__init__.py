"""Evaluation of weights on a data set, for any task."""
