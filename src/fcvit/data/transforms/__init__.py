"""Preprocessing of images, and augmentation for training."""
