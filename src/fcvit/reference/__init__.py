"""The same networks in PyTorch, written independently: every numerical check compares with them."""
