"""Images from files: preprocessing, labelled images, batches of them, and augmentation for training."""
