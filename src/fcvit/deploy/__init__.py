"""What computes logits: engines."""
