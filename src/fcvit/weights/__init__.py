"""Weights as files and as named NumPy tensors; needs neither Paddle nor PyTorch."""
