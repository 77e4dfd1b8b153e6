"""Image data sets: where images come from, how they become square uint8 tensors, and in which order they train."""

from deme_core.images.batches import TrainingBatches, fits_in_memory, normalize
from deme_core.images.dataset import ImageDataset, load_images
from deme_core.images.squares import CropsInMemory
from deme_core.images.subset import ImageSubset, num_heldout_of, split_heldout
from deme_core.images.training_batch import CropSizes, TrainingBatch

__all__ = [
    "CropSizes",
    "CropsInMemory",
    "ImageDataset",
    "ImageSubset",
    "TrainingBatch",
    "TrainingBatches",
    "fits_in_memory",
    "load_images",
    "normalize",
    "num_heldout_of",
    "split_heldout",
]
