"""Scores: COCO AP, panoptic quality and mIoU, as recorded and during training."""
