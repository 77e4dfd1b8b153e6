"""Evaluation: one denoiser's images, scored against a reference, under settings all rows share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deme_core.digests import spell_infinities
from deme_core.errors import DatasetError, NonFiniteImagesError
from deme_core.extractors import FeatureArray, FeatureExtractor
from deme_core.extractors.clip import ClipScore
from deme_core.families import Adapter
from deme_core.feature_statistics import Features, check_features
from deme_core.generate import Denoiser, generate
from deme_core.metrics import Comparison, MetricName, score
from deme_core.prompts import Prompts
from deme_core.reference import Reference
from deme_core.sampling import Sampling
from deme_core.seeds import generator


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Some images of a set, and what scores need of them.

    Attributes:
        images: uint8 (B, C, H, W).
        features: (B, D).
        clip_scores: how well each image fits its prompt, (B,); None where that is not asked for.
    """

    images: torch.Tensor
    features: Features
    clip_scores: FeatureArray | None


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """Features of generated images, made in memory: what every row shares before anything is scored.

    Attributes:
        adapter: all about the model but its denoiser.
        sampling: sampler and its settings.
        extractor: turns images into features.
        device: where the denoiser is.
        prompts: the texts that images belong to, and that a model which takes text makes them from, in turn.
        clip: scores images against their prompts; None where that is not asked for.
    """

    adapter: Adapter
    sampling: Sampling
    extractor: FeatureExtractor
    device: torch.device | str
    prompts: Prompts | None = None
    clip: ClipScore | None = None

    def source_conditions(self) -> dict[str, Any]:
        """Returns all that features must share to be compared, by name; the batch size is not among it."""
        scheduler = self.sampling.build_scheduler(self.adapter)
        config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        return {
            "sampler": self.sampling.sampler,
            "num_inference_steps": self.sampling.num_inference_steps,
            "eta": self.sampling.eta,
            "scheduler": spell_infinities(config),
            "dtype": self.sampling.dtype,
            "shape": list(self.adapter.image_shape),
            "extractor": self.extractor.digest,
            **({"guidance_scale": self.sampling.guidance_scale} if self.sampling.guidance_scale != 1.0 else {}),
            **({"prompts": self.prompts.digest} if self.prompts else {}),
            **({"clip": self.clip.digest} if self.clip else {}),
        }

    def batches(self, denoiser: Denoiser, seed: int, indices: Sequence[int]) -> Iterator[ImageBatch]:
        """Yields images with their features, any slice of the set that ``seed`` names.

        Args:
            denoiser: what predicts.
            seed: names the set of images.
            indices: which images of the set.

        Raises:
            NonFiniteImagesError: an image, or what is computed of it, is NaN or infinite.
        """
        done = 0
        for images in generate(
            denoiser,
            self.adapter,
            self.sampling,
            seed=seed,
            indices=indices,
            prompts=self.prompts,
            device=self.device,
        ):
            features = check_features(self.extractor(images), at_least=1)
            yield ImageBatch(images, features, self._clip_scores(images, indices[done:]))
            done += len(images)

    def _clip_scores(self, images: torch.Tensor, indices: Sequence[int]) -> FeatureArray | None:
        """Scores of images (B, C, H, W) that are the first B of ``indices`` in their set."""
        if self.clip is None:
            return None
        assert self.prompts is not None, "a CLIP score without prompts"
        scores = self.clip(images, self.prompts.of_images(indices[: len(images)]))
        if not np.isfinite(scores).all():
            raise NonFiniteImagesError("CLIP scores are NaN or infinite; check evaluate.clip_weights.")
        return scores


def score_images(
    source: FeatureSource,
    denoiser: Denoiser,
    seed: int,
    *,
    num_images: int,
    reference: Reference,
    metrics: Sequence[MetricName],
    kid_subset_size: int,
) -> dict[str, float]:
    """Generates and scores the images of one seed, holding one batch of them at a time.

    Args:
        source: how images become features.
        denoiser: what is scored.
        seed: names the set of images.
        num_images: how many, the first of the set.
        reference: the real images, as features of the same extractor.
        metrics: what is computed.
        kid_subset_size: images per subset of the kernel distance.

    Returns:
        The scores by metric name.

    Raises:
        NonFiniteImagesError: an image, or what is computed of it, is NaN or infinite.
    """
    batches = [(each.features, each.clip_scores) for each in source.batches(denoiser, seed, range(num_images))]
    comparison = Comparison(
        features=np.concatenate([features for features, _ in batches]),
        reference=reference,
        kid_subset_size=kid_subset_size,
        clip_scores=np.concatenate([scores for _, scores in batches if scores is not None]) if source.clip else None,
    )
    return score(comparison, metrics)


def score_conditions(
    reference: Reference, *, num_images: int, metrics: Sequence[MetricName], kid_subset_size: int
) -> dict[str, Any]:
    """Returns what scores of features must share besides `FeatureSource.source_conditions`."""
    return {
        "num_images": num_images,
        "reference": {"images": reference.images_digest, "num_images": reference.num_images},
        # Others may be more or fewer: of two evaluations those that both have are compared. But clip_score brings CLIP
        # into the source's conditions, and more_extractors change the extractor's digest there.
        "deciding_metric": metrics[0],
        "kid_subset_size": kid_subset_size,
    }


def num_searched(num_images: int, num_for_search: int | None, num_for_report: int | None) -> int:
    """Returns how many of so many real images a search sets aside.

    Args:
        num_images: images in all.
        num_for_search: as asked for; None for half of them.
        num_for_report: how many of the others the report asks for; None for all.

    Raises:
        DatasetError: more are asked for than there are.
    """
    aside = num_images // 2 if num_for_search is None else num_for_search
    if aside > num_images - 2:
        raise DatasetError(
            f"merge.search.num_reference_images {aside} leaves none of the {num_images} images of the data set for the "
            "report; lower it."
        )
    if num_for_report is not None and num_for_report > num_images - aside:
        raise DatasetError(
            f"evaluate.num_reference_images asks for {num_for_report} images, but only {num_images - aside} are there; "
            "lower it."
        )
    return aside


def split_reference(
    num_images: int, num_for_search: int, num_for_report: int | None = None
) -> tuple[list[int], list[int]]:
    """Draws the real images that a search may see and those the report uses, disjoint, from all of the data set.

    Neither is the beginning of the data set, which in a folder per class would be images of one class.

    Args:
        num_images: images in the data set.
        num_for_search: images set aside for the search; 0 without one.
        num_for_report: how many of the others the report uses; None for all.

    Returns:
        Sorted indices for the search and for the report.
    """
    order = torch.randperm(num_images, generator=generator("reference", num_images))
    return sorted(order[:num_for_search].tolist()), sorted(order[num_for_search:][:num_for_report].tolist())
