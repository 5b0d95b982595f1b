"""Accuracy of weights on labeled images: one pass, records, figures, results."""
