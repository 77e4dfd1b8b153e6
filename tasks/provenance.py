"""What it takes to do a run again: versions, digests, a command."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deme_core.artifacts import ArtifactStore
from deme_core.code_version import code_version
from tasks.jobs import JobResult

# What numbers depend on.
_PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "transformers",
    "timm",
    "clean-fid",
    "numpy",
    "scipy",
    "scikit-learn",
    "optuna",
    "datasets",
    "safetensors",
)
_CPU_INFO = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Returns the versions of Python, of the packages that numbers depend on, and what machine this is."""
    found = {"Python": platform.python_version(), "deme": code_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"system": platform.platform(terse=True), "processor": _processor()}


def _processor() -> str:
    """Returns the processor's name: another model may change numbers in the fourth digit."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def evaluation_digests(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns the digests of an evaluation, by what they are digests of."""
    conditions = report["conditions"]
    return {
        "evaluation (fingerprint)": report["fingerprint"],
        "real images of the reference": conditions["reference"]["images"],
        "feature extractor": conditions["extractor"],
    }


def model_digests(
    artifacts: ArtifactStore, models: Mapping[str, JobResult], trainings: Mapping[str, JobResult]
) -> dict[str, str]:
    """Returns the digests of the models, of their trainings, and of the images these saw."""
    trained = {f"training of {name}": result.ref.digest for name, result in trainings.items()}
    seen = {_dataset(artifacts, list(trainings.values()))} - {None}
    return {
        **{f"model {name}": result.ref.digest for name, result in models.items()},
        **trained,
        **({"training images": str(seen.pop())} if seen else {}),
    }


def _dataset(artifacts: ArtifactStore, trainings: Sequence[JobResult]) -> str | None:
    return artifacts.manifest(trainings[0].ref).dataset if trainings else None
