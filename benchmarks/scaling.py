"""What a run takes, predicted by `deme_core` against measured in small runs, each job on a machine of its own.

    python -m benchmarks.scaling [--quick]

Operations are counted by torch while the jobs run, backward passes included; bytes and calls by a store that counts.
"""

import argparse
import json
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.laboratory import Laboratory
from benchmarks.measurement import print_result, print_table
from benchmarks.run_traffic import estimate_traffic, measure_artifacts
from deme_core.cost_estimate import estimate_cost
from deme_core.denoiser_size import measure_denoiser
from deme_core.families import Unconditional
from deme_core.file_store import FileStore
from deme_core.recipe import Recipe
from deme_core.settings import Settings
from tasks.jobs import FinetuneJob, GeneratedFeaturesJob, Job, JobResult, PretrainJob

_GOAL = 1.2


class CountingStore(FileStore):
    """A folder that counts calls by name, and bytes both ways; files of an artifact travel on several threads."""

    def __init__(self, location: str | Path) -> None:
        super().__init__(location)
        self.calls: Counter[str] = Counter()
        self.written = self.read = 0
        self._lock = threading.Lock()

    def _count(self, call: str, *, written: int = 0, read: int = 0) -> None:
        with self._lock:
            self.calls[call] += 1
            self.written += written
            self.read += read

    def put_file(self, key: str, path: Path) -> None:
        """Counts and copies a file in."""
        self._count("put", written=path.stat().st_size)
        super().put_file(key, path)

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Counts and writes."""
        self._count("put", written=len(data))
        return super().put_bytes(key, data, if_absent=if_absent)

    def get_file(self, key: str, path: Path, *args: Any, **kwargs: Any) -> None:
        """Counts and copies a file out."""
        super().get_file(key, path, *args, **kwargs)
        self._count("get", read=path.stat().st_size)

    def get_bytes(self, key: str) -> bytes:
        """Counts and reads."""
        data = super().get_bytes(key)
        self._count("get", read=len(data))
        return data

    def exists(self, key: str) -> bool:
        """Counts and looks."""
        self._count("head")
        return super().exists(key)

    def list(self, prefix: str) -> Iterator[Any]:
        """Counts and lists."""
        self._count("list")
        return super().list(prefix)

    def delete(self, key: str) -> None:
        """Counts and deletes."""
        self._count("delete")
        super().delete(key)


class Measured:
    """A small run, job by job, each with an empty cache and a worker of its own."""

    def __init__(self, recipe: Recipe, home: Path) -> None:
        self.recipe, self.home = recipe, home
        self.training_flops = self.image_flops = 0.0

    def run(self) -> None:
        """Does all jobs of the recipe with fixed weights, but its search and its report."""
        from tasks.work.base import JobContext

        do = Laboratory.do

        def watched(laboratory: Laboratory, job: Job) -> JobResult:
            if (known := self._done.get(job.model_dump_json())) is not None:
                return known
            shutil.rmtree(self.home / "cache", ignore_errors=True)
            laboratory.context = JobContext(Settings(), "cpu")
            with FlopCounterMode(display=False) as counter:
                result = do(laboratory, job)
            if isinstance(job, PretrainJob | FinetuneJob):
                self.training_flops += counter.get_total_flops()
            if isinstance(job, GeneratedFeaturesJob):
                self.image_flops += counter.get_total_flops() - job.num_generated_images * self._extractor_flops
            if job.stage == "features" and not isinstance(job, GeneratedFeaturesJob):
                self._extractor_flops = counter.get_total_flops() / result.metrics["num_in_all"]
            self._done[job.model_dump_json()] = result
            return result

        self._done: dict[str, JobResult] = {}
        with patch.object(Laboratory, "do", watched):
            laboratory = Laboratory(self.recipe)
            self.reference = laboratory.reference("report")
            experts, control = laboratory.experts(), laboratory.control()
            merged = laboratory.merged(experts, self.recipe.merge.weights or ())
            scaled = laboratory.merged((control,), (1.0,))
            for model in (laboratory.pretrained.ref, scaled, merged):
                laboratory.scores((model,))
                laboratory.heldout(model)
            laboratory.scores(experts, laboratory.edges)
            for expert in experts:
                laboratory.heldout(expert)


def _recipe(count: int, width: int, num_steps: int, num_images: int) -> Recipe:
    training = {"num_steps": num_steps, "batch_size": 4, "checkpoint_every": 2}
    return Recipe.model_validate(
        {
            "name": "scaling",
            "pretrained": {
                "source": "pretrain",
                "unet": {
                    "block_out_channels": [width, 2 * width],
                    "layers_per_block": 1,
                    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
                    "norm_num_groups": 4,
                    "attention_head_dim": 8,
                },
                "training": training,
            },
            "dataset": {"source": "digits", "num_images": 64},
            "segments": {"count": count},
            "finetune": training,
            "merge": {"weights": [0.5] * count},
            "evaluate": {
                "num_images": num_images,
                "num_inference_steps": 4,
                "extractor": "efficientnet_lite0",
                "extractor_resolution": 32,
                "kid_subset_size": 4,
            },
        }
    )


@contextmanager
def _store(home: Path) -> Iterator[CountingStore]:
    store = CountingStore(home / "store")
    variables = {"DEME_HOME": str(home), "DEME_STORE_URI": store.uri}
    with patch.dict("os.environ", variables), patch("tasks.work.base.open_store", lambda _: store):
        yield store


def compare(count: int, width: int, num_steps: int, num_images: int) -> dict[str, tuple[float, float]]:
    """Returns predicted and measured numbers of one small run."""
    recipe = _recipe(count, width, num_steps, num_images)
    with tempfile.TemporaryDirectory() as folder, _store(Path(folder)) as store:
        measured = Measured(recipe, Path(folder))
        measured.run()
        stored = sum(found.size for found in store.list(""))
        store.calls["list"] -= 1
        models = Path(folder) / "store" / "pretrained"
        denoiser, scheduler = (
            json.loads(next(models.rglob(name)).read_text()) for name in ("unet/config.json", "scheduler_config.json")
        )
        adapter = Unconditional(denoiser_config=denoiser, scheduler_config=scheduler)
        num_real, num_features = (measured.reference.metrics[name] for name in ("num_images", "num_features"))
    size = measure_denoiser(adapter, channel_projection=recipe.finetune.channel_projection)
    artifacts = measure_artifacts(recipe, size, num_real=num_real, num_features=num_features)
    cost = estimate_cost(recipe, size, num_images=64, num_features=num_features)
    traffic = estimate_traffic(recipe, artifacts)
    return {
        "operations of training": (cost.training_flops, measured.training_flops),
        "operations of images": (cost.evaluation_flops, measured.image_flops),
        "bytes left in the store": (
            cost.model_bytes + cost.feature_bytes + 2 * artifacts.real.num_bytes,
            stored,
        ),
        "bytes written": (traffic.written, store.written),
        "bytes read": (traffic.read, store.read),
        "calls of the store": (traffic.calls, sum(store.calls.values())),
    }


def main() -> None:
    """Prints predictions beside measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smallest run alone")
    quick = parser.parse_args().quick
    runs = [(2, 32, 5, 16), (4, 32, 5, 16), (2, 64, 5, 16), (2, 32, 9, 16), (2, 32, 5, 64)][: 1 if quick else None]
    worst = 1.0
    for count, width, num_steps, num_images in runs:
        rows = []
        for what, (predicted, found) in compare(count, width, num_steps, num_images).items():
            ratio = predicted / found
            worst = max(worst, ratio, 1 / ratio)
            rows.append([what, f"{predicted:.4g}", f"{found:.4g}", f"{ratio:.3f}"])
        title = f"{count} segments, a UNet {width} channels wide, {num_steps} steps, {num_images} images a row and seed"
        print_table(title, ["", "predicted", "measured", "ratio"], rows)
    print_result("scaling", ratio=worst, goal=_GOAL, holds=bool(worst <= _GOAL))


if __name__ == "__main__":
    main()
