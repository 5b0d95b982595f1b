"""Image classification: the task's answers to the questions of `fcvit.tasks.base`."""
