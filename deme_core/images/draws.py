"""What chance decides about one training batch, as a function of its number alone."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from deme_core.data_parallel import Share
from deme_core.seeds import generator


@dataclass(frozen=True, eq=False)
class BatchDraws:
    """The draws of one batch of B images.

    Attributes:
        indices: which images, int64 (B,).
        crops: where a random crop lies, from top and left, float64 (B, 2) in [0, 1).
        mirrored: which images are mirrored, bool (B,).
        dropped: which captions and labels are replaced by the empty ones, bool (B,).
    """

    indices: torch.Tensor
    crops: torch.Tensor
    mirrored: torch.Tensor
    dropped: torch.Tensor

    def of(self, share: Share) -> "BatchDraws":
        """Returns the draws of one process's part of the batch."""
        return BatchDraws(*(share.of(rows) for rows in (self.indices, self.crops, self.mirrored, self.dropped)))


@dataclass(frozen=True)
class BatchSchedule:
    """An endless stream of draws; each epoch is a permutation of its own, and batches are cut from all of them joined.

    Attributes:
        num_images: images in the data set.
        batch_size: images per batch, of one process.
        seed: names the stream.
        random_flip: mirror half of the images.
        caption_dropout: chance that caption and label are dropped.
        share: which part of larger batches this process trains on.
        windows: for a data set that is streamed, which images may be near each other.
    """

    num_images: int
    batch_size: int
    seed: int
    random_flip: bool
    caption_dropout: float = 0.0
    share: Share = field(default_factory=Share)
    windows: "ShardWindows | None" = None

    def __getitem__(self, number: int) -> BatchDraws:
        """Returns the draws of batch ``number``; the global random generators are neither read nor moved."""
        total = self.batch_size * self.share.num_processes
        draws = _uniform((total, 3), "crops", self.seed, number)
        whole = BatchDraws(
            indices=self._indices(number),
            crops=draws[:, :2],
            mirrored=(draws[:, 2] < 0.5) & self.random_flip,
            dropped=_uniform((total,), "captions", self.seed, number) < self.caption_dropout,
        )
        return whole.of(self.share)

    def _indices(self, number: int) -> torch.Tensor:
        batch_size = self.batch_size * self.share.num_processes
        first, last, size = number * batch_size, (number + 1) * batch_size, self.num_images
        epochs = range(first // size, (last - 1) // size + 1)
        # Cut first: an epoch is copied as a whole otherwise, for each batch.
        return torch.cat([self._epoch(e)[max(first - e * size, 0) : last - e * size] for e in epochs])

    def _epoch(self, epoch: int) -> torch.Tensor:
        if self.windows is not None:
            return self.windows.order(self.seed, epoch)
        return _epoch_order(self.num_images, self.seed, epoch)


class ShardWindows:
    """Permutations that read a few shards at a time: shards are shuffled, and images within each ``size`` of them.

    Args:
        shards: number of the shard that each image is in, int64 (num_images,).
        size: shards that are mixed at a time.
    """

    def __init__(self, shards: torch.Tensor, size: int) -> None:
        self._shards, self._size = shards, size
        self._orders: dict[tuple[int, int], torch.Tensor] = {}

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """Returns the order of one epoch, int64 (num_images,); a function of its arguments alone."""
        if (seed, epoch) not in self._orders:
            rng = generator("windows", seed, epoch)
            places = torch.randperm(int(self._shards.max()) + 1, generator=rng)
            order = torch.randperm(len(self._shards), generator=rng)
            window = places[self._shards[order]] // self._size
            self._orders = {key: kept for key, kept in self._orders.items() if key[1] == epoch - 1}
            self._orders[seed, epoch] = order[window.argsort(stable=True)]
        return self._orders[seed, epoch]


def _uniform(shape: tuple[int, ...], what: str, seed: int, number: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator(what, seed, number))


@lru_cache(maxsize=4)
def _epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(num_images, generator=generator("epoch", seed, epoch))
