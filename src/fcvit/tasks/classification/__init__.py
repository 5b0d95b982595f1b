"""Image classification: the implementation of the interface in `fcvit.tasks.base`."""
