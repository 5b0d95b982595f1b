"""Read, preprocess, augment and batch labeled images."""
