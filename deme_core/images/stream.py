"""Tars in an object store that are too many for a disk: streamed through a bounded cache, in windows of a few tars.

Each tar is read once to index it: where its images lie, their digests, and its texts. The index lies in the object
store, so that no other job and no other machine reads the tars for it again.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import PIL
import torch

from deme_core.digests import json_digest, sha256_bytes
from deme_core.errors import ArtifactNotFoundError, DatasetError
from deme_core.images.draws import ShardWindows
from deme_core.images.inspection import BROKEN, verdict
from deme_core.images.shard_cache import ShardCache, changed
from deme_core.images.tars import CLASSES, JSON, TEXTS, Member, Sample, TarSource
from deme_core.store import ObjectStore, StoredObject

_GB = 10**9
_VERSION = 2


@dataclass(frozen=True, eq=False)
class Stream:
    """How a data set is streamed, for those who train on it.

    Attributes:
        shards: number of the tar that each image is in, int64 (num_images,).
        window: tars that are mixed at a time.
        source: the tars.
    """

    shards: torch.Tensor
    window: int
    source: "StreamedTars"

    @cached_property
    def windows(self) -> ShardWindows:
        """In which order images train."""
        return ShardWindows(self.shards, self.window)

    def subset(self, indices: Sequence[int]) -> "Stream":
        """Returns the same for some of the images."""
        return Stream(self.shards[torch.tensor(indices)], self.window, self.source)

    def hold(self, indices: torch.Tensor) -> None:
        """Brings the tars of some images here."""
        self.source.hold(self.shards[indices].unique().tolist())


class StreamedTars(TarSource):
    """The samples of the tars below a prefix of an object store; see `TarSource`.

    Args:
        tars: the objects.
        store: where they are.
        cache: folder for copies.
        index_store: where the index is, or will be.
        cache_gb: bound of the copies, 10^9 bytes.
        window: tars that are mixed at a time, which the cache must hold.
        channels: in which images must decode.
        num_images: index no more tars than hold so many sound images, 0: none yet; None: all.
        image_column: extension of the images; None for the one image of each sample.

    Raises:
        DatasetError: a tar is damaged or compressed, or the cache cannot hold a window.
        StoreUnavailableError: a store cannot be reached.
    """

    def __init__(
        self,
        tars: Sequence[StoredObject],
        store: ObjectStore,
        *,
        cache: Path,
        index_store: ObjectStore,
        cache_gb: float,
        window: int,
        channels: int,
        num_images: int | None,
        image_column: str | None = None,
    ) -> None:
        self._objects = sorted(tars, key=lambda tar: tar.key)
        self._tars, self._root = [Path(tar.key) for tar in self._objects], Path()
        self._image_column, self._channels = image_column, channels
        self.description = f"the {len(tars)} tars at {store.uri}"
        self._store, self._index_store = store, index_store
        self._shards = ShardCache(store, cache / "shards", round(cache_gb * _GB))
        self._check_window(window)
        self._samples: list[Sample] = []
        self.verdicts: list[str] = []
        self._load(num_images)

    def _check_window(self, window: int) -> None:
        largest = sorted((tar.size for tar in self._objects), reverse=True)[:window]
        if sum(largest) > self._shards.max_bytes:
            raise DatasetError(
                f"dataset.cache_gb must hold the {len(largest)} tars of stream_window, up to {sum(largest) / _GB:.3g} "
                "GB; raise it or lower dataset.stream_window."
            )

    def _load(self, num_images: int | None) -> None:
        if num_images is None:  # Jobs that start at once share the work, for each begins elsewhere.
            for number in random.Random().sample(range(len(self._objects)), len(self._objects)):
                self._index(number)
        for number in range(len(self._objects)):
            if num_images is not None and sum(not v.startswith(BROKEN) for v in self.verdicts) >= num_images:
                break
            for row in json.loads(self._index(number)):
                texts = {e: _member_of(number, text) for e, text in row["texts"].items()}
                image = Member(number, row["offset"], row["size"])
                self._samples.append(Sample(number, row["key"], {row["image"]: image} | texts, row["image"]))
                self.verdicts.append(row["verdict"])

    def _index_key(self, tar: StoredObject) -> str:
        # A tar that is written anew is another tar; which images can be decoded depends on the version of Pillow.
        version = [_VERSION, self._store.uri, *tar.identity, PIL.__version__]
        name = json_digest([version, self._channels, self._image_column])
        return f"stream-index/{name}.json"

    def _index(self, number: int) -> bytes:
        """Returns the index of one tar, made now if nobody has."""
        tar = self._objects[number]
        key = self._index_key(tar)
        try:
            return self._index_store.get_bytes(key)
        except ArtifactNotFoundError:
            with self._shards.reading(tar) as file:
                # Surrogates are bytes of names that are not UTF-8; json.loads takes them back.
                content = json.dumps(self._rows(tar, file), ensure_ascii=False).encode(errors="surrogatepass")
        self._index_store.put_bytes(key, content)
        return content

    def _rows(self, tar: StoredObject, file: BinaryIO) -> list[dict[str, object]]:
        local = self._whole(tar, file)
        return [
            {
                "key": sample.key,
                "image": sample.image,
                "offset": sample.members[sample.image].offset,
                "size": sample.members[sample.image].size,
                "verdict": verdict(local, position, self._channels),
                "texts": {
                    # What is no UTF-8 is kept as it is, for whoever asks for it to refuse.
                    extension: local.read_member(member).decode(errors="surrogateescape")
                    for extension, member in sample.members.items()
                    if extension in (*TEXTS, *CLASSES, JSON)
                },
            }
            for position, sample in enumerate(local.samples)
        ]

    def _whole(self, tar: StoredObject, file: BinaryIO) -> TarSource:
        try:
            return TarSource([Path(tar.key)], Path(), self._image_column, file)
        except DatasetError:
            self._shards.discard(tar)  # Perhaps it was damaged on its way: the next run does not take this copy.
            raise

    @contextmanager
    def first_tar(self) -> Iterator[TarSource]:
        """Gives the first tar by itself, which is brought here but not indexed: for a look at what tars hold."""
        tar = self._objects[0]
        with self._shards.reading(tar) as file:
            yield self._whole(tar, file)

    @property
    def num_tars(self) -> int:
        """How many there are, indexed or not."""
        return len(self._objects)

    @property
    def listing(self) -> str | None:
        """None: verdicts are in the index, and in no record of this machine."""
        return None

    @property
    def shard_of(self) -> list[int]:
        """Number of the tar that each image is in."""
        return [sample.tar for sample in self._samples]

    def hold(self, shards: Sequence[int]) -> None:
        """Brings tars here, for images of which many are about to be read."""
        self._shards.fetch([self._objects[number] for number in shards])

    def read_member(self, member: Member) -> bytes:
        """Read from the copy of the tar, where there is a whole one; otherwise only these bytes from the store."""
        if member.content is not None:
            return member.content
        tar = self._objects[member.tar]
        with suppress(FileNotFoundError):
            content = self._pread(self._shards.path(tar), member)
            if len(content) == member.size:
                return content
        return self._store.get_range(tar.key, member.offset, member.size)

    def read(self, index: int) -> bytes:
        """Read the image of one sample; where it is not the one that was indexed, once more from the store.

        Raises:
            DatasetError: it is not that one there either. The next run indexes its tar anew.
        """
        tar, expected = self._objects[self._samples[index].tar], self.verdicts[index]
        for _ in range(2):
            content = super().read(index)
            if expected.startswith(BROKEN) or sha256_bytes(content) == expected:
                return content
            self._shards.discard(tar)  # It may have been damaged on its way, or on this disk.
        self._index_store.delete(self._index_key(tar))  # And so may what was indexed.
        raise changed(f"{self.name(index)} at {self._store.uri}")


def _member_of(tar: int, text: str) -> Member:
    content = text.encode(errors="surrogateescape")
    return Member(tar, 0, len(content), content)
