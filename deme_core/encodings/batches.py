"""Training batches from encodings: what `TrainingBatches` and `encode_batch` give together, without any encoder."""

import itertools
from collections.abc import Iterator, Sequence

import torch

from deme_core.data_parallel import current_share
from deme_core.encodings.embeddings import Embeddings
from deme_core.encodings.latents import Latents
from deme_core.families import Adapter, ConditioningTensors, EncodedBatch
from deme_core.images import ImageDataset
from deme_core.images.batches import batch_captions, batch_labels
from deme_core.images.draws import BatchDraws, BatchSchedule


class EncodedBatches:
    """Batches ``start_batch``, ``start_batch`` + 1, … of the same endless stream as `TrainingBatches`.

    Args:
        images: the images that training sees, for their captions and labels; none is decoded.
        positions: of these images in ``latents``.
        latents: of the whole data set.
        embeddings: of its captions; None for a model that takes none.
        adapter: encodes labels and sizes, which takes no frozen part.
        batch_size: images per batch.
        seed: names the stream.
        random_flip: mirror half of the images left to right.
        caption_dropout: chance that caption and label are replaced by the empty ones.
        start_batch: number of the first batch to yield.
    """

    def __init__(
        self,
        images: ImageDataset,
        positions: Sequence[int],
        latents: Latents,
        embeddings: Embeddings | None,
        adapter: Adapter,
        *,
        batch_size: int,
        seed: int,
        random_flip: bool,
        caption_dropout: float = 0.0,
        start_batch: int = 0,
    ) -> None:
        self._images, self._positions = images, torch.tensor(positions)
        self._labels = None if images.labels is None else torch.tensor(images.labels)
        self._latents, self._embeddings, self._adapter = latents, embeddings, adapter
        self._schedule = BatchSchedule(len(images), batch_size, seed, random_flip, caption_dropout, current_share())
        self._start_batch = start_batch

    def __iter__(self) -> Iterator[EncodedBatch]:
        return map(self._batch, itertools.count(self._start_batch))

    def _batch(self, number: int) -> EncodedBatch:
        draws = self._schedule[number]
        rows = self._latents.gather(self._positions[draws.indices], draws.mirrored)
        sizes = self._adapter.encode_sizes(len(rows.latents), rows.sizes)
        return EncodedBatch(rows.latents, self._conditioning(draws) | sizes)

    def _conditioning(self, draws: BatchDraws) -> ConditioningTensors:
        conditioning: ConditioningTensors = {}
        captions = batch_captions(self._images.captions, draws)
        if self._embeddings is not None:
            assert captions is not None, "there are embeddings of captions, but no captions"
            conditioning |= self._embeddings.gather(captions)
        if self._adapter.conditioned_on == "labels":
            labels = batch_labels(self._labels, draws)
            assert labels is not None, "the encoder of the images had refused them without labels"
            conditioning |= self._adapter.encode_labels(labels.tolist())
        return conditioning
