"""Slices of an image set, for tasks of their own. No torch here: the flow makes them."""

REAL_BATCH_SIZE = 64  # Real images per call of the extractor.
ENCODED_AT_ONCE = 16  # Images, or captions, per call of an encoder.


def slices(num_images: int, *, batch_size: int, images_per_task: int) -> list[tuple[int, int]]:
    """Divides [0, num_images) into half-open ranges for tasks of their own.

    Each but the last is a whole number of batches, so that every image is generated in the same company, and so bit
    for bit alike, however many tasks there are.

    Args:
        num_images: images in all.
        batch_size: images per sampling batch.
        images_per_task: images of a range at the most, but at least one batch.
    """
    step = slice_size(images_per_task, batch_size)
    return [(low, min(low + step, num_images)) for low in range(0, num_images, step)]


def slice_size(images_per_task: int, batch_size: int) -> int:
    """Returns the images of a slice: a whole number of batches, ``images_per_task`` or less, but at least one batch."""
    return max(images_per_task // batch_size, 1) * batch_size
