"""Detection and instance segmentation: training, evaluation and prediction of Mask R-CNN."""
