"""Features of a slice of the images that one row generates under one sampling seed."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deme_core.feature_file import save_features
from deme_core.figures import save_image_grid
from deme_core.generate import Denoiser, Ensemble, SingleModel
from deme_core.lora import LoraEnsemble, LoraExpert
from deme_core.model_folder import ModelFolder, load_denoiser, open_model_folder
from deme_core.segments import TimestepSegment
from tasks.jobs import GeneratedFeaturesJob, GeneratedImages
from tasks.work.base import Identity, JobContext, Work
from tasks.work.check import SAMPLING
from tasks.work.naming import naming
from tasks.work.prompted import prompt_settings
from tasks.work.real_features import extractor_digest
from tasks.work.scoring import build_source

NUM_SAMPLES_SHOWN = 64
SAMPLES = "samples.png"


def identity(job: GeneratedFeaturesJob, context: JobContext) -> Identity:
    """Models, seed, sampling, extractor, slice and prompts; not what is computed from the features."""
    return Identity(
        settings={
            **image_settings(job.images),
            "sampling": job.evaluate.model_dump(mode="json", include=SAMPLING),
            "extractor": extractor_digest(job.evaluate, context),
            "slice": [job.low, job.high],
            **prompt_settings(job.evaluate, context),
        },
        inputs=image_inputs(job.images),
    )


def image_settings(images: GeneratedImages) -> dict[str, Any]:
    """Returns what of an image set is part of a digest besides its models."""
    return {"edges": images.edges, "seed": images.seed}


def image_inputs(images: GeneratedImages) -> dict[str, str]:
    """Returns the digests of the models, by role."""
    return {f"model-{index}": model.digest for index, model in enumerate(images.models)}


def run(job: GeneratedFeaturesJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the features, CLIP scores where they are asked for, and a grid of the first images of the set."""
    folders = [context.open_model(model) for model in job.images.models]
    denoiser = _denoiser(folders, job.images.edges, context.device)
    source = build_source(context, job.evaluate, model=folders[0])
    features, clip_scores, shown, num_images = list[Any](), list[Any](), list[torch.Tensor](), job.high - job.low
    yield {"done": 0, "total": num_images}
    with naming(job.label):
        for batch in source.batches(denoiser, job.images.seed, range(job.low, job.high)):
            if job.low == 0:
                shown.append(batch.images[: max(NUM_SAMPLES_SHOWN - sum(map(len, features)), 0)])
            features.append(batch.features)
            clip_scores.append(batch.clip_scores)
            yield {"done": sum(map(len, features)), "total": num_images}
    save_features(out, np.concatenate(features), np.concatenate(clip_scores) if source.clip else None)
    if shown:
        save_image_grid(torch.cat(shown), out / SAMPLES)
    return {"num_images": num_images, "conditions": source.source_conditions()}


def _denoiser(folders: list[ModelFolder], edges: tuple[int, ...] | None, device: str) -> Denoiser:
    """Returns the one model; or the ensemble, of which LoRA experts share one."""
    if edges is None:
        return SingleModel(load_denoiser(folders[0]).eval().to(device))
    segments = [TimestepSegment(*pair) for pair in itertools.pairwise(edges)]
    if folders[0].index.lora_base is None:
        return Ensemble(segments, [load_denoiser(folder).eval().to(device) for folder in folders])
    assert folders[0].frozen is not None
    base = open_model_folder(folders[0].frozen)
    experts = [folder.expert(base) for folder in folders]
    loras = [expert for expert in experts if isinstance(expert, LoraExpert)]
    return LoraEnsemble(load_denoiser(base).eval().to(device), segments, loras)
