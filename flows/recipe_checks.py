"""What a recipe needs, looked for piece by piece, and what it will take: the second half of ``deme doctor RECIPE``."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from deme_core.cost_estimate import H100_PEAK, NUM_CHECKPOINTS_STORED, UTILIZATION, CostEstimate, estimate_cost
from deme_core.denoiser_size import measure_denoiser
from deme_core.errors import InputError
from deme_core.evaluation import num_searched
from deme_core.extractors import load_extractors
from deme_core.extractors.clip import clip_score_digest
from deme_core.families import Adapter, check_conditioned
from deme_core.families.latent_adapter import LatentAdapter
from deme_core.file_store import FileStore
from deme_core.generate import Sampling
from deme_core.images import num_heldout_of
from deme_core.images.preview import preview_images
from deme_core.merge_methods.block_weights import block_names
from deme_core.metrics import needs_prompts
from deme_core.model_folder import ModelFolder, open_model_folder
from deme_core.model_source import fetch_source
from deme_core.optimizer import build_optimizer
from deme_core.prompts import load_prompts
from deme_core.recipe import DatasetSpec, Recipe
from deme_core.segments import recipe_segments
from deme_core.settings import Settings
from flows.doctor import existing_part
from flows.stack.stack import Stack
from flows.untrained_adapter import untrained_adapter
from tasks.ray_pool import cluster_address
from tasks.slots import Slot, plan_slots

Check = tuple[str, Callable[[], str]]
_GB = 10**9
_SIDE = 1024


class RecipeChecks:
    """The checks of one recipe. What is fetched stays in the cache, where a run finds it.

    Args:
        recipe: what is going to be run.
        settings: of this environment.
    """

    def __init__(self, recipe: Recipe, settings: Settings) -> None:
        self.recipe, self.settings, self.cache = recipe, settings, settings.cache_folder
        self._adapter: Adapter | None = None
        self._frozen_bytes = 0
        self._num_images: int | None = None
        self._has_images = False
        self._num_features: int | None = None

    def __iter__(self) -> Iterator[Check]:
        """Yields name and check, the estimate only if all that it needs was found by then."""
        evaluate = self.recipe.evaluate
        yield "workers", self._workers
        yield "model", self._model
        yield "data set", self._dataset
        if evaluate.reference_dataset:
            yield "real images", self._reference
        if evaluate.prompts:
            yield "prompts", self._prompts
        if self._adapter and self._adapter.conditioned_on == "labels":
            yield "classes", self._classes
        yield "extractor", self._extractor
        if needs_prompts(evaluate.metrics):
            yield "CLIP score", self._clip
        if self._adapter and self._has_images and self._num_features:
            yield "time", self._time
            yield "memory", self._memory
            yield "storage", self._storage
            if self.recipe.execution.runner == "local":
                yield "disk", self._disk

    def _workers(self) -> str:
        if self.recipe.execution.runner == "prefect":
            return "other machines, by Prefect's work pools; what follows is looked for on this one"
        if self.recipe.execution.runner == "ray":
            return f"{cluster_address(self.recipe.execution)}; what follows is looked for on this machine"
        slots, num_processes = self._slots(1), max(self.recipe.process_counts)
        found = f"{len(slots)} on {slots[0].device}, {slots[0].num_threads} threads each"
        if num_processes > 1 and slots[0].device == "cuda":
            found += f", or {len(self._slots(num_processes))} trainings of {num_processes} GPUs"
        return found

    def _slots(self, num_processes: int) -> list[Slot]:
        """Returns the places that this machine has for jobs of so many processes."""
        slots = plan_slots(self.recipe.execution, num_processes)
        return [slot for slot in slots if slot.gpu is None or slot.gpu.count(",") + 1 == num_processes]

    @property
    def _num_workers(self) -> int | None:
        """How many trainings there is room for at once; None where other machines decide, or this one is not fit."""
        execution = self.recipe.execution
        if execution.runner == "local":
            with suppress(InputError):  # Which `workers` has said.
                return len(self._slots(self.recipe.finetune.num_processes))
        return execution.num_workers if execution.runner == "prefect" else None

    def _model(self) -> str:
        source = self.recipe.pretrained
        for training in filter(None, (source.training, self.recipe.finetune, self.recipe.distill)):
            build_optimizer([nn.Parameter(torch.zeros(1))], training)  # It may need a package that is not here.
        if source.source == "pretrain":
            self._adapter = untrained_adapter(self.recipe)
            self._check_sampling(self._adapter)
            return "trained here"
        path = fetch_source(source.source, revision=source.revision, cache=self.cache)
        folder = open_model_folder(path, allow_pickle=source.allow_pickle)
        adapter = folder.adapter()
        self._frozen_bytes = sum(file.stat().st_size for file in folder.frozen_files(allow_pickle=source.allow_pickle))
        self._check_fits(folder, adapter)
        self._adapter = adapter
        return f"{source.source}, a {adapter.pipeline}"

    def _check_fits(self, folder: ModelFolder, adapter: Adapter) -> None:
        """Raises an InputError if the recipe asks for what the model cannot do."""
        dataset, evaluate = self.recipe.dataset, self.recipe.evaluate
        self._check_sampling(adapter)
        self.recipe.check_search(len(block_names(folder.checkpoint().infos)))
        captions = dataset.caption_column or dataset.caption_template
        check_conditioned(adapter, captions=captions, labels=dataset.label_column)
        if adapter.conditioned_on == "captions" and evaluate.prompts is None:
            raise InputError(f"A {adapter.pipeline} makes images from text; set evaluate.prompts.")
        channels, height, _ = adapter.image_shape
        wanted = (dataset.num_channels, dataset.side)
        if (channels, height) != wanted:
            raise InputError(
                f"The model makes images of {height} pixels and {channels} channels, not of {wanted[1]} and "
                f"{wanted[0]}; set dataset.resolution and dataset.channels."
            )

    def _check_sampling(self, adapter: Adapter) -> None:
        evaluate = self.recipe.evaluate
        recipe_segments(self.recipe.segments, adapter.noise_process.num_train_timesteps)
        search = self.recipe.merge.search
        few_steps = [search.few_steps] if search and search.few_steps else []
        for num_steps in (evaluate.num_inference_steps, *few_steps):
            Sampling(
                evaluate.sampler,
                num_steps,
                timestep_spacing=evaluate.timestep_spacing,
                guidance_scale=evaluate.guidance_scale,
            ).build_scheduler(adapter)
        if self.recipe.dataset.cache_latents and not isinstance(adapter, LatentAdapter):
            raise InputError("dataset.cache_latents is for models on latents, and this one is on pixels; leave it out.")

    def _dataset(self) -> str:
        self._num_images = preview_images(self.recipe.dataset, self.cache)
        # What is streamed is not encoded, and nothing else in the estimate depends on the number of images.
        self._has_images = bool(self._num_images) or self.recipe.dataset.stream
        if self._num_images is not None:
            num_heldout_of(self._num_images, self.recipe.dataset.num_heldout_images)
            if self.recipe.evaluate.reference_dataset is None:
                self._check_reference(self._num_images)
        return _described(self.recipe.dataset, self._num_images)

    def _check_reference(self, num_images: int) -> None:
        search = self.recipe.merge.search
        aside = search.num_reference_images if search else 0
        num_searched(num_images, aside, self.recipe.evaluate.num_reference_images)

    def _reference(self) -> str:
        dataset = self.recipe.reference_dataset
        num_images = preview_images(dataset, self.cache)
        if num_images is not None:
            self._check_reference(num_images)
        return _described(dataset, num_images)

    def _prompts(self) -> str:
        prompts = load_prompts(str(self.recipe.evaluate.prompts), self.cache)
        return f"'{prompts.texts[0]}' and so on, {self._shares(len(prompts.texts), 'prompts')}"

    def _classes(self) -> str:
        assert self._adapter is not None
        return self._shares(self._adapter.num_classes, "classes")

    def _shares(self, number: int, kind: str) -> str:
        """Returns how many images each prompt or class has: image i has the one that is i modulo their number."""
        search = self.recipe.merge.search
        sets = {"the report": self.recipe.evaluate.num_images} | ({"the search": search.num_images} if search else {})
        found = []
        for who, num_images in sets.items():
            each, rest = divmod(num_images, number)
            share = f"{each} of each" if not rest else f"{each} or {each + 1} of each"
            found.append(f"{who}'s {num_images:,} images are " + (share if each else f"of the first {rest:,} alone"))
        return f"{number:,} {kind}; {' and '.join(found)}"

    def _extractor(self) -> str:
        evaluate = self.recipe.evaluate
        extractor = load_extractors(
            evaluate.extractor_names,
            weights=evaluate.extractor_weights,
            resolution=evaluate.extractor_resolution,
            cache=self.cache,
            device="cpu",
        )
        self._num_features = extractor.num_features
        return f"{extractor.name}, {extractor.num_features:,} features"

    def _clip(self) -> str:
        weights = self.recipe.evaluate.clip_weights
        digest = clip_score_digest(weights=weights, cache=self.cache)
        return f"{weights or 'ViT-B/32 from the hub'}, digest {digest[:12]}"

    @cached_property
    def _cost(self) -> CostEstimate:
        assert self._adapter is not None
        assert self._num_features is not None
        return estimate_cost(
            self.recipe,
            measure_denoiser(
                self._adapter,
                channel_projection=self.recipe.finetune.channel_projection,
                lora=self.recipe.finetune.lora,
            ),
            num_images=self._num_images or 0,
            num_features=self._num_features,
            frozen_bytes=self._frozen_bytes,
            num_workers=self._num_workers,
        )

    def _time(self) -> str:
        cost, precision = self._cost, self.recipe.finetune.mixed_precision
        sampling = self.recipe.evaluate.mixed_precision
        training, images = UTILIZATION * H100_PEAK[precision], UTILIZATION * H100_PEAK[sampling]
        hours = cost.seconds(training_rate=training, image_rate=images) / 3600
        done = (
            f"estimate, not measured: {hours:,.1f} GPU-hours at {UTILIZATION:.0%} of an H100's dense peak, for "
            f"{cost.training_flops:.2g} operations of training in {precision}, and in {sampling} "
            f"{cost.search_flops:.2g} of searches and {cost.evaluation_flops:.2g} of the report's images"
        )
        if self.recipe.execution.runner == "local" and self._slots(1)[0].device == "cpu":
            rate = measure_cpu()
            seconds = cost.seconds(training_rate=rate, image_rate=rate)
            done += f"; {seconds / 3600:,.2f} hours at the {rate:.3g} that this CPU multiplies matrices with"
        return done

    def _memory(self) -> str:
        return f"estimate: {_gigabytes(self._cost.memory_bytes)} of one training, activations apart"

    def _storage(self) -> str:
        cost = self._cost
        checkpoints = NUM_CHECKPOINTS_STORED * cost.checkpoint_bytes
        return (
            f"estimate: at its peak {_gigabytes(cost.storage_bytes)} in the object store: "
            f"{_gigabytes(cost.model_bytes)} of models, {_gigabytes(checkpoints)} of checkpoints "
            f"({NUM_CHECKPOINTS_STORED} of each training, {cost.num_trainings} at once), "
            f"{_gigabytes(cost.feature_bytes)} of features, {_gigabytes(cost.encoding_bytes)} of latents and embeddings"
        )

    def _disk(self) -> str:
        home = existing_part(self.settings.state_folder)
        needed, what = self._cost.local_bytes, "cache and scratch"
        store = self._store_folder()
        if store is not None and existing_part(store).stat().st_dev == home.stat().st_dev:
            needed, what = needed + self._cost.storage_bytes, "cache, scratch and object store"
        free = shutil.disk_usage(home).free
        if needed > free:
            raise InputError(
                f"A run from nothing needs up to {_gigabytes(needed)} for {what}, and the disk of "
                f"{self.settings.state_folder} has {_gigabytes(free)} free; free space or point DEME_HOME elsewhere."
            )
        return f"estimate: up to {_gigabytes(needed)} for {what}, of {_gigabytes(free)} free"

    def _store_folder(self) -> Path | None:
        """Returns the folder of this machine that holds all objects; None where they lie elsewhere."""
        home, uri = self.settings.state_folder, self.settings.store_uri
        if uri.startswith("file://"):
            return FileStore(uri).folder
        with suppress(InputError):  # `deme up` was never called.
            if os.environ.get("AWS_ENDPOINT_URL") == Stack(home).layout().url("s3"):
                return home / "stack" / "s3"
        return None


def measure_cpu() -> float:
    """Returns how many operations per second this CPU does in float32: products of matrices, for half a second."""
    left, right = torch.rand(2, _SIDE, _SIDE)
    left @ right  # The first one wakes the threads.
    started, num_products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < 0.5 or not num_products:
        left @ right
        num_products += 1
    return 2 * _SIDE**3 * num_products / elapsed


def _described(dataset: DatasetSpec, num_images: int | None) -> str:
    return (
        f"{dataset.path or dataset.source}, {'unknown number of' if num_images is None else f'{num_images:,}'} images"
    )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / _GB:,.3g} GB"
