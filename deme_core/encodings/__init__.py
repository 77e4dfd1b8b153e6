"""Encodings: what VAE and text encoders make of a data set, computed once, so that a training step needs neither.

They are kept as tensors with one row per image, or per caption, in safetensors files: one file for each tensor and
slice of the data set. A training run has all slices on its disk and maps them into memory, which holds no more than
the system's page cache finds room for. So any row is read at any time, and a run on encodings takes the very batches
that it would take on images, in the same order: batch k is a function of the seed and k, resumed or not.
"""

from deme_core.encodings.batches import EncodedBatches
from deme_core.encodings.embeddings import Embeddings, distinct_captions, write_embeddings
from deme_core.encodings.latents import Latents, write_latents

__all__ = [
    "Embeddings",
    "EncodedBatches",
    "Latents",
    "distinct_captions",
    "write_embeddings",
    "write_latents",
]
