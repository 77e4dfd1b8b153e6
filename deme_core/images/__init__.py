"""Image data sets: where images come from, how they become square uint8 tensors, and in which order they train."""

from deme_core.images.batches import TrainingBatches, normalize
from deme_core.images.dataset import ImageDataset, load_images

__all__ = ["ImageDataset", "TrainingBatches", "load_images", "normalize"]
