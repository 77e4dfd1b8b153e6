"""CIFAR-10 from nothing to a merged model, in pieces of minutes: one call is one piece; see benchmarks/gpu/cifar10.sh.

A piece of pretraining goes on from the moving average that the piece before left, with a fresh optimizer: weights are
the only state. When a piece lowers the held-out loss by less than `--flat`, theta_0 is done; then the laboratory of
benchmarks.claim decouples, merges and evaluates, job by job, as long as there is time; a training that is cut leaves a
checkpoint. There is one training seed, so `holds` is false whatever comes out: read `differences`.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.claim import all_differences, outcome, print_setting
from benchmarks.claim_cell import run_cell
from benchmarks.gpu.parted_state import pack, unpack
from benchmarks.laboratory import Laboratory
from benchmarks.measurement import print_result
from deme_core.errors import WorkerStoppedError
from deme_core.recipe import Recipe
from deme_core.recipe_file import load_recipe
from deme_core.settings import Settings
from tasks.work.base import JobContext

_RECIPE = Path(__file__).with_name("cifar10.yaml")
# Of a piece, for training; the rest is for imports, losses, packing.
_SHARE, _SECONDS_TO_PACK = 0.7, 20.0
# Cheap to make again, or of no use to anybody who goes on.
_NOT_CARRIED = ("pretrained", "checkpoints", "merged", "grams", "confined")
_TOY = (
    "pretrained.unet.block_out_channels=[8,16,16]",
    "pretrained.unet.norm_num_groups=4",
    "pretrained.unet.layers_per_block=1",
    "pretrained.unet.attention_head_dim=8",
    "pretrained.training.batch_size=8",
    "pretrained.training.mixed_precision=fp32",
    "finetune.mixed_precision=fp32",
    "finetune.batch_size=8",
    "finetune.num_steps=4",
    "dataset.num_images=96",
    "merge.search.max_candidates=5",
    "merge.search.num_images=8",
    "merge.search.num_reference_images=32",
    "evaluate.num_images=8",
    "evaluate.num_inference_steps=4",
    "evaluate.extractor_resolution=32",
    "evaluate.num_reference_images=32",
    "evaluate.kid_subset_size=4",
)


class PieceIsOverError(Exception):
    """There is no time for another job."""


class Piece:
    """One piece of the whole way.

    Args:
        home: DEME_HOME, with what the piece before left.
        options: of the command line.
        deadline: when no further job may begin, by the monotonic clock.
    """

    def __init__(self, home: Path, options: argparse.Namespace, deadline: float) -> None:
        self._home, self._options, self._deadline = home, options, deadline
        self._context = JobContext(Settings(), options.device)
        self._theta = home / "theta"
        progress = home / "progress.json"
        self.progress: dict[str, Any] = json.loads(progress.read_text()) if progress.exists() else {"pretraining": []}

    @property
    def is_flat(self) -> bool:
        """Whether the last piece of pretraining gained next to nothing."""
        losses = [piece["heldout_loss"] for piece in self.progress["pretraining"]]
        return len(losses) > 1 and (losses[-2] - losses[-1]) / losses[-2] < self._options.flat

    def run(self) -> dict[str, Any] | None:
        """Does what there is time for; returns the result if that is all."""
        if not self.is_flat:
            self._pretrain()
        if not self.is_flat:
            return None
        # A training longer than what is left leaves a checkpoint, from which the next piece goes on.
        timer = threading.Timer(max(0.0, self._deadline - time.monotonic()), self._context.stop.set)
        timer.daemon = True
        timer.start()
        try:
            return self._merge_and_evaluate()
        except (PieceIsOverError, WorkerStoppedError):
            if self._options.carry == "model":
                print("The rest did not fit in one piece; with CARRY=all the next one goes on from here.")
            return None
        finally:
            timer.cancel()

    def _recipe(self, *overrides: str) -> Recipe:
        toy = _TOY if self._options.toy else ()
        given = [f"dataset.path={self._options.images}", *toy, *self._options.overrides, *overrides]
        return load_recipe(str(_RECIPE), given)

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise PieceIsOverError

    def _pretrain(self) -> None:
        """Trains theta_0 on, for as many steps as a trial promises time for."""
        recipe = self._recipe()
        num_images = len(self._context.training_images(recipe.dataset))
        # Beyond the first epoch, whose steps wait for images to be decoded; what it decoded stays in memory.
        num_trial_steps = self._options.trial_steps or num_images // recipe.finetune.batch_size + 40
        trial = self._train_on(num_trial_steps, seed=2**20)
        rate = trial["history"][-1]["images_per_sec"] / recipe.finetune.batch_size
        left = (self._deadline - time.monotonic()) * _SHARE
        num_steps = max(1, min(self._options.max_steps, int(rate * left)))
        number = len(self.progress["pretraining"])
        done = self._train_on(num_steps, seed=number, keep=True)
        entry = {"num_steps": num_steps, "steps_per_sec": rate, "heldout_loss": done["heldout_loss"]}
        self.progress["pretraining"].append(entry)
        print(
            f"Piece {number + 1} of pretraining: {num_steps} steps, held-out loss {done['heldout_loss']:.5f}",
            flush=True,
        )

    def _train_on(self, num_steps: int, *, seed: int, keep: bool = False) -> dict[str, Any]:
        """Trains from theta, or from nothing, on all timesteps; keeps the result as theta if it shall be kept."""
        if not self._theta.exists():
            steps = (f"pretrained.training.num_steps={num_steps}", f"pretrained.training.seed={seed}")
            laboratory = Laboratory(self._recipe(*steps), context=self._context)
            model, metrics = laboratory.pretrained.ref, laboratory.pretrained.metrics
        else:
            training = self._recipe().pretrained.training
            assert training is not None
            alike = {**training.model_dump(exclude={"num_steps"}), "seed": seed, "lr_warmup_steps": 20}
            plain = self._recipe("pretrained=" + json.dumps({"source": str(self._theta)}))
            finetune = plain.finetune.for_control(1).model_copy(update={**alike, "global_sampling_probability": 0.0})
            recipe = plain.model_copy(update={"finetune": finetune})
            laboratory = Laboratory(recipe, context=self._context)
            model = laboratory.finetuned(0, laboratory.edges[-1], num_steps)
            metrics = laboratory.context.artifacts.manifest(model).metrics
        if not keep:
            return metrics
        loss = laboratory.mean_heldout(model)
        folder = shutil.copytree(laboratory.context.fetch(model), self._home / "theta.new")
        shutil.rmtree(self._theta, ignore_errors=True)
        folder.rename(self._theta)
        for name in ("store", "cache"):  # Of pretraining only theta goes on.
            shutil.rmtree(self._home / name, ignore_errors=True)
        return {**metrics, "heldout_loss": loss}

    def _merge_and_evaluate(self) -> dict[str, Any]:
        recipe = self._recipe("pretrained=" + json.dumps({"source": str(self._theta)}))
        cell = run_cell(recipe, self._options.merges, context=self._context, before_job=self._check_time)
        print_setting("CIFAR-10 (JPEG), 32 x 32", [cell], [0])
        return {
            **outcome([cell]),
            "device": _device_name(self._options.device),
            "toy": self._options.toy,
            "scores": {name: list(scores.by_seed) for name, scores in cell.scores.items()},
            "weights": dict(cell.weights),
            "heldout": dict(cell.heldout),
            "loss_changes": dict(cell.loss_changes),
            "differences": all_differences([cell]),
            **self.progress,
        }

    def save(self, state: Path, result: dict[str, Any] | None) -> None:
        """Leaves for the next piece what it needs."""
        (self._home / "progress.json").write_text(json.dumps(self.progress, indent=1))
        carried = [self._home / "progress.json", *self._theta.rglob("*")]
        store = self._home / "store"
        if self._options.carry == "all" and store.exists():
            for stage in store.iterdir():
                carried += stage.rglob("*") if stage.name not in _NOT_CARRIED else ()
            # Of a training that was cut, the newest checkpoint: each is four times the model.
            for training in store.glob("checkpoints/*"):
                carried += max(training.iterdir(), default=training).rglob("*")
        num_parts = pack(self._home, [path for path in carried if path.is_file()], state)
        if result is not None:
            (state / "result.json").write_text(json.dumps({"name": "cifar10", **result}, indent=1))
        print(f"{state}: {num_parts} parts of at most 15 MB", flush=True)


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def main(arguments: Sequence[str] | None = None) -> None:
    """Does one piece; exit status 0 when all is done, 3 when another piece is needed."""
    options = _options(arguments)
    if (options.state / "result.json").exists():
        print((options.state / "result.json").read_text())
        return
    deadline = time.monotonic() + options.piece_seconds - _SECONDS_TO_PACK
    for name in [name for name in os.environ if name.startswith(("AWS_", "DEME_"))]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="deme-cifar10-", ignore_cleanup_errors=True) as home:
        os.environ["DEME_HOME"] = home
        unpack(options.state, Path(home))
        piece = Piece(Path(home), options, deadline)
        result = piece.run()
        piece.save(options.state, result)
    if result is None:
        print("Not done yet: call it again.")
        sys.exit(3)
    print_result("cifar10", **result)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.cifar10", description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--state", type=Path, required=True, help="folder of what pieces leave behind")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--piece-seconds", type=float, default=540.0, help="how long this piece may take")
    parser.add_argument("--carry", choices=["all", "model"], default="all", help="what a piece leaves to the next")
    parser.add_argument("--flat", type=float, default=0.003, help="gain of a piece below which pretraining is done")
    parser.add_argument("--trial-steps", type=int, help="steps that tell how fast it goes (default an epoch and 40)")
    parser.add_argument("--max-steps", type=int, help="most steps of a piece (default 20000, toy 4)")
    parser.add_argument("--merges", nargs="+", default=["cma_es", "uniform", "regmean"], help="as of benchmarks.claim")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    parser.add_argument("--toy", action="store_true", help="a toy on a few images: shows that it runs")
    options = parser.parse_args(arguments)
    options.trial_steps = options.trial_steps or (2 if options.toy else None)
    options.max_steps = options.max_steps or (4 if options.toy else 20_000)
    return options


if __name__ == "__main__":
    main()
