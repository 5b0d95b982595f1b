"""Read and write weights as named NumPy tensors. Needs neither Paddle nor PyTorch."""
