"""What a recipe will take, for a person and this machine: the last lines of ``deme doctor RECIPE``."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch

from deme_core.cost_estimate import H100_PEAK, NUM_CHECKPOINTS_STORED, UTILIZATION, CostEstimate, estimate_cost
from deme_core.denoiser_size import measure_denoiser
from deme_core.errors import InputError
from deme_core.families import Adapter
from deme_core.file_store import FileStore
from deme_core.recipe import Recipe
from deme_core.settings import Settings
from flows.doctor import existing_part
from flows.stack.stack import Stack
from tasks.slots import Slot, plan_slots

_GB = 10**9
_SIDE = 1024


class RecipeEstimate:
    """Lines on the cost of one recipe; `disk` fails where it is more than this machine has.

    Args:
        recipe: what is going to be run.
        settings: of this environment.
        adapter: of its model; weights are not looked at.
        num_images: of the data set; 0 if that is not known.
        num_features: of all extractors.
        frozen_bytes: of the model's frozen parts.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: Settings,
        adapter: Adapter,
        *,
        num_images: int,
        num_features: int,
        frozen_bytes: int,
    ) -> None:
        self.recipe, self.settings, self.adapter = recipe, settings, adapter
        self._numbers = {"num_images": num_images, "num_features": num_features, "frozen_bytes": frozen_bytes}

    def __iter__(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Yields name and check."""
        yield "time", self._time
        yield "memory", self._memory
        yield "storage", self._storage
        if self.recipe.execution.runner == "local":
            yield "disk", self._disk

    @cached_property
    def _cost(self) -> CostEstimate:
        finetune = self.recipe.finetune
        size = measure_denoiser(self.adapter, channel_projection=finetune.channel_projection, lora=finetune.lora)
        return estimate_cost(self.recipe, size, num_workers=_num_workers(self.recipe), **self._numbers)

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
        if self.recipe.execution.runner == "local" and local_slots(self.recipe, 1)[0].device == "cpu":
            rate = _measure_cpu()
            seconds = cost.seconds(training_rate=rate, image_rate=rate)
            done += f"; {seconds / 3600:,.2f} hours at the {rate:.3g} that this CPU multiplies matrices with"
        return done

    def _memory(self) -> str:
        cost, sampled = self._cost, "a search's candidate" if self.recipe.merge.search else "the ensemble"
        return (
            f"estimate: {_gigabytes(cost.memory_bytes)} of one training, {_gigabytes(cost.sampling_bytes)} of the "
            f"models of {sampled}; activations and frozen parts apart"
        )

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


def local_slots(recipe: Recipe, num_processes: int) -> list[Slot]:
    """Returns the places that this machine has for jobs of so many processes."""
    slots = plan_slots(recipe.execution, num_processes)
    return [slot for slot in slots if slot.gpu is None or slot.gpu.count(",") + 1 == num_processes]


def _num_workers(recipe: Recipe) -> int | None:
    """Returns how many trainings there is room for at once; None where others decide, or this machine is not fit."""
    if recipe.execution.runner == "local":
        with suppress(InputError):  # Which the check of the workers has said.
            return len(local_slots(recipe, recipe.finetune.num_processes))
    return recipe.execution.num_workers if recipe.execution.runner == "prefect" else None


def _measure_cpu() -> float:
    """Returns how many operations per second this CPU does in float32: products of matrices, for half a second."""
    left, right = torch.rand(2, _SIDE, _SIDE)
    left @ right  # The first one wakes the threads.
    started, num_products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < 0.5 or not num_products:
        left @ right
        num_products += 1
    return 2 * _SIDE**3 * num_products / elapsed


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / _GB:,.3g} GB"
