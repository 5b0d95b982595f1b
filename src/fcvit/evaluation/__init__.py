"""Accuracy of weights on labelled images: one pass, records, figures, results."""
