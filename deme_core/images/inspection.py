"""Inspection: every image is decoded once before work starts, and its content digested."""

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import PIL

from deme_core.digests import sha256_bytes
from deme_core.errors import DatasetError
from deme_core.images.pixels import BrokenImageError, decode
from deme_core.images.source import ImageSource
from deme_core.local_files import local_errors, temporary_beside

CHUNK_SIZE = 1024
NUM_CHUNKS_PER_MESSAGE = 16
NUM_THREADS = min(8, os.cpu_count() or 1)
BROKEN = "broken: "
SHA256_SIZE = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inspection:
    """The images of a source that are used.

    Attributes:
        indices: their positions in the source, in order.
        content: sha256 over the hexadecimal sha256 of each one's encoded bytes, in order.
        digests: these sha256, 32 bytes for each; none of a data set that is streamed, which looks itself.
        num_skipped: broken images that were left out.
        record: file that keeps the verdicts on this listing; None where there is none.
    """

    indices: Sequence[int]
    content: str
    digests: bytes
    num_skipped: int
    record: Path | None

    def check(self, index: int, encoded: bytes) -> None:
        """Raises BrokenImageError unless these are the bytes of image ``index`` that were inspected.

        By content, which no source can get wrong: beside decoding it takes a few percent, and files that were only
        touched, linked or given other permissions are what they were.
        """
        if hashlib.sha256(encoded).digest() != self.digests[index * SHA256_SIZE : (index + 1) * SHA256_SIZE]:
            if self.record is not None:  # Perhaps the record is wrong: the next run inspects anew.
                self.record.unlink(missing_ok=True)
            raise BrokenImageError("another image")


def inspect(
    source: ImageSource, *, num_images: int | None, skip_broken: bool, channels: int, cache: Path
) -> Inspection:
    """Find the first ``num_images`` images that can be decoded (None: all).

    The verdicts on files that have not changed since are read from ``cache``.

    Raises:
        DatasetError: no image, too few, or a broken one that is not to be skipped.
    """
    if not len(source):
        raise DatasetError(f"There is no image in {source.description}; check dataset.path.")
    # Which images can be decoded depends on the version of Pillow.
    record = cache / "inspected" / f"{source.listing}-{channels}-pillow-{PIL.__version__}" if source.listing else None
    verdicts = _verdicts(source, wanted=num_images or len(source), channels=channels, record=record)
    sound = [index for index, verdict in enumerate(verdicts) if not verdict.startswith(BROKEN)][:num_images]
    if not skip_broken:
        _refuse_broken(source, verdicts[:num_images])
    if len(sound) < (num_images or 1):
        raise DatasetError(
            f"dataset.num_images is {num_images} but {source.description} has {len(sound)}; lower it."
            if num_images
            else f"None of the {len(verdicts)} images in {source.description} can be decoded; check dataset.path."
        )
    found = [verdicts[index] for index in sound]
    digests = b"" if hasattr(source, "verdicts") else bytes.fromhex("".join(found))
    num_seen = sound[-1] + 1 if len(sound) == num_images else len(verdicts)
    return Inspection(sound, sha256_bytes("\n".join(found).encode()), digests, num_seen - len(sound), record)


def _verdicts(source: ImageSource, *, wanted: int, channels: int, record: Path | None) -> list[str]:
    """One verdict per image, in order, at least until ``wanted`` are sound: its digest, or why it is broken."""
    if (indexed := getattr(source, "verdicts", None)) is not None:  # Of a data set that is streamed.
        return list(indexed)
    verdicts = record.read_text("utf-8").splitlines() if record and record.exists() else []
    num_known, num_sound = len(verdicts), _num_sound(verdicts)
    with ThreadPoolExecutor(NUM_THREADS) as executor:
        while num_sound < wanted and len(verdicts) < len(source):
            chunk = range(len(verdicts), min(len(verdicts) + min(wanted - num_sound, CHUNK_SIZE), len(source)))
            verdicts += executor.map(lambda index: verdict(source, index, channels), chunk)
            num_sound += _num_sound(verdicts[chunk.start :])
            if len(verdicts) % (NUM_CHUNKS_PER_MESSAGE * CHUNK_SIZE) == 0:
                logger.info("inspected %d of %d images in %s", len(verdicts), len(source), source.description)
    if record and len(verdicts) > num_known:
        _write_lines(record, verdicts)
    return verdicts


def verdict(source: ImageSource, index: int, channels: int) -> str:
    """Returns the digest of one image, or why it is broken."""
    try:
        encoded = source.read(index)
        decode(encoded, channels=channels)
    except BrokenImageError as error:
        return BROKEN + " ".join(str(error).split())
    return sha256_bytes(encoded)


def _num_sound(verdicts: Iterable[str]) -> int:
    return sum(not verdict.startswith(BROKEN) for verdict in verdicts)


def _refuse_broken(source: ImageSource, verdicts: Sequence[str]) -> None:
    broken = [index for index, verdict in enumerate(verdicts) if verdict.startswith(BROKEN)]
    if broken:
        reason = verdicts[broken[0]].removeprefix(BROKEN)
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise DatasetError(
            f"{source.name(broken[0])} ({reason}){others} in {source.description} cannot be decoded; replace what is "
            "broken, or set dataset.skip_broken: true."
        )


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with local_errors(path), temporary_beside(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
        temporary.replace(path)
