"""Images from files: preprocessing, labeled images, batches of them, and augmentation for training."""
