"""Mask R-CNN in PaddlePaddle, and its selection of boxes and masks in NumPy, which every engine uses."""
