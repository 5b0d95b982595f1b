"""Semantic segmentation: the implementation of the interface in `fcvit.tasks.base`."""
