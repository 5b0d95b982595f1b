"""Independent PyTorch implementation of the networks, used as the reference in every numerical check."""
