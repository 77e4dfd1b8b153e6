"""What a recipe needs, looked for piece by piece: the second half of ``deme doctor RECIPE``."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from deme_core.errors import InputError
from deme_core.evaluation import num_searched
from deme_core.extractors import load_extractors
from deme_core.extractors.clip import clip_score_digest
from deme_core.families import Adapter, check_conditioned
from deme_core.families.latent_adapter import LatentAdapter
from deme_core.images import num_heldout_of
from deme_core.images.preview import Preview, preview_images
from deme_core.merge_methods.block_weights import block_names
from deme_core.metrics import needs_prompts
from deme_core.model_folder import ModelFolder, check_copy, load_infos, open_model_folder
from deme_core.model_source import fetch_source
from deme_core.optimizer import build_optimizer
from deme_core.prompts import load_prompts
from deme_core.recipe import DatasetSpec, Recipe
from deme_core.segments import recipe_segments
from deme_core.settings import Settings
from flows.recipe_estimate import RecipeEstimate, local_slots
from flows.untrained_adapter import untrained_adapter
from tasks.jobs import Demands
from tasks.ray_cluster import cluster_address
from tasks.work.check import check

Check = tuple[str, Callable[[], str]]
_MAX_TEXT = 60


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
        self._images: Preview | None = None
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
            yield from RecipeEstimate(
                self.recipe,
                self.settings,
                self._adapter,
                num_images=self._images.num_images or 0 if self._images else 0,
                num_features=self._num_features,
                frozen_bytes=self._frozen_bytes,
            )

    def _workers(self) -> str:
        if self.recipe.execution.runner == "prefect":
            return "other machines, by Prefect's work pools; what follows is looked for on this one"
        if self.recipe.execution.runner == "ray":
            return f"{cluster_address(self.recipe.execution)}; what follows is looked for on this machine"
        slots, num_processes = local_slots(self.recipe, 1), max(self.recipe.process_counts)
        found = f"{len(slots)} on {slots[0].device}, {slots[0].num_threads} threads each"
        if num_processes > 1 and slots[0].device == "cuda":
            found += f", or {len(local_slots(self.recipe, num_processes))} trainings of {num_processes} GPUs"
        return found

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
        for copy in self.recipe.copies:
            path = fetch_source(copy, revision=None, cache=self.cache)
            check_copy(open_model_folder(path, allow_pickle=source.allow_pickle), folder)
        self._adapter = adapter
        copies = f", and {len(self.recipe.copies)} copies of it" if self.recipe.copies else ""
        return f"{source.source}, a {adapter.pipeline}{copies}"

    def _check_fits(self, folder: ModelFolder, adapter: Adapter) -> None:
        """Raises an InputError if the recipe asks for what the model cannot do."""
        dataset, evaluate = self.recipe.dataset, self.recipe.evaluate
        self._check_sampling(adapter)
        self.recipe.check_search(len(block_names(load_infos(folder))))
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
        recipe_segments(self.recipe.segments, adapter.noise_process.num_train_timesteps)
        check(adapter, Demands.of(self.recipe))
        if self.recipe.dataset.cache_latents and not isinstance(adapter, LatentAdapter):
            raise InputError("dataset.cache_latents is for models on latents, and this one is on pixels; leave it out.")

    def _dataset(self) -> str:
        self._images = preview_images(self.recipe.dataset, self.cache)
        num_images, is_streamed = self._images.num_images, self.recipe.dataset.stream
        # What is streamed is not encoded, and nothing else in the estimate depends on the number of images.
        self._has_images = bool(num_images) or is_streamed
        if num_images is not None:
            num_heldout_of(num_images, self.recipe.dataset.num_heldout_images)
            if self.recipe.evaluate.reference_dataset is None:
                self._check_reference(num_images)
        described = _described(self.recipe.dataset, self._images)
        return described if self._has_images else f"{described}; without their number there is no estimate"

    def _check_reference(self, num_images: int) -> None:
        search = self.recipe.merge.search
        aside = search.num_reference_images if search else 0
        num_searched(num_images, aside, self.recipe.evaluate.num_reference_images)

    def _reference(self) -> str:
        dataset = self.recipe.reference_dataset
        images = preview_images(dataset, self.cache)
        if images.num_images is not None:
            self._check_reference(images.num_images)
        return _described(dataset, images)

    def _prompts(self) -> str:
        prompts = load_prompts(str(self.recipe.evaluate.prompts), self.cache)
        return f"'{_short(prompts.texts[0])}' and so on, {self._shares(len(prompts.texts), 'prompts')}"

    def _classes(self) -> str:
        assert self._adapter is not None
        found = self._shares(self._adapter.num_classes, "classes")
        if self._images is None or self._images.labels is None:
            return found
        self._adapter.check_labels(self._images.labels)
        found += f"; the data set has {len(self._images.labels):,} of them"
        if names := self._images.class_names:
            told = ", ".join(f"{name} {number}" for number, name in enumerate(names[:3]))
            found += f", numbered in the order of their names ({_short(told)}): see that the model numbers them so"
        return found

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


def _described(dataset: DatasetSpec, images: Preview) -> str:
    number = "unknown number of" if images.num_images is None else f"{images.num_images:,}"
    found = f"{dataset.path or dataset.source}, {number} images"
    if images.caption is not None:
        found += f", the first '{_short(images.caption)}'"
    return found if images.is_looked_at else f"{found}, none of which was looked at before the run fetches them"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
