"""What the jobs that encode a data set share, and how a training opens what they made."""

from dataclasses import dataclass
from typing import Any

from deme_core.digests import json_digest
from deme_core.encodings import Embeddings, Latents, distinct_captions
from deme_core.families import check_conditioned
from deme_core.model_json import content_digest
from tasks.jobs import DistillJob, EmbeddingsJob, FinetuneJob, LatentsJob
from tasks.work.base import JobContext


@dataclass(frozen=True, eq=False)
class Encodings:
    """The data set of a training, encoded.

    Attributes:
        latents: of all images.
        embeddings: of all captions; None for a model that takes none.
    """

    latents: Latents
    embeddings: Embeddings | None


def open_encodings(job: FinetuneJob | DistillJob, context: JobContext) -> Encodings | None:
    """Returns what a training reads instead of images; None if it was not encoded."""
    if not job.latents:
        return None
    images = context.images(job.dataset)
    latents = Latents(
        [context.fetch(ref) for ref in job.latents], resolution=images.resolution, mirrored=job.dataset.random_flip
    )
    folders = [context.fetch(ref) for ref in job.embeddings]
    return Encodings(latents, Embeddings(folders, distinct_captions(images.captions or ())) if folders else None)


def encoder_settings(job: LatentsJob | EmbeddingsJob, context: JobContext, *parts: str) -> dict[str, Any]:
    """Returns what the digest of encodings says of the encoder and of how numbers are stored.

    Models that differ in their denoisers only, as the checkpoints of one training run do, share encodings.

    Args:
        job: names the model and the precision.
        context: gives the model.
        *parts: beginnings of the names of the parts that encode.

    Raises:
        InputError: the data set lacks the captions or labels that the model is conditioned on.
    """
    images, model = context.images(job.dataset), context.open_model(job.pretrained)
    adapter = model.adapter()
    check_conditioned(adapter, captions=images.captions, labels=images.labels)
    manifest = context.artifacts.manifest(job.pretrained)
    files = {
        file.name: content_digest(model.path / file.name) if file.name.endswith(".json") else file.sha256
        for file in manifest.files
        if file.name.startswith(parts)
    }
    named = [adapter.pipeline, adapter.latent_shape, files]
    if "text_encoder" in parts and adapter.prompt_settings:  # Digests made without any stay.
        named.append(adapter.prompt_settings)
    encoder = json_digest(named)
    return {"encoder": encoder, "precision": job.dataset.cache_precision}
