"""Where work runs."""

from typing import Literal

from pydantic import Field

from deme_core.recipe.base import Spec


class ExecutionSpec(Spec):
    """Where work runs. Numbers change by rounding, and on another kind of processor by the noise of trainings."""

    runner: Literal["local", "prefect", "ray"] = Field(
        "local",
        description="local: supervised worker processes on this machine. prefect: every job is a flow run of its own, "
        "on whatever machine serves the work pool deme-gpu or deme-cpu. ray: on a Ray cluster, wherever it has room.",
    )
    ray_address: str | None = Field(
        None,
        description="ray: the cluster, e.g. ray://HOST:10001; default RAY_ADDRESS, and without it this machine alone.",
    )
    cpus_per_job: int = Field(
        1, ge=1, description="ray: cores that each process of a job reserves, and threads that it uses."
    )
    gpu_stages: tuple[
        Literal[
            "pretrained",
            "latents",
            "embeddings",
            "finetune",
            "features",
            "reference",
            "heldout",
            "grams",
            "confined",
            "search",
            "merged",
            "distilled",
            "evaluate",
        ],
        ...,
    ] = Field(
        ("pretrained", "latents", "embeddings", "finetune", "heldout", "grams", "search", "distilled", "features"),
        description="prefect: the stages whose jobs go to deme-gpu. ray: those whose jobs reserve a GPU for each of "
        "their processes, if the cluster has any or device is cuda. All others take CPUs alone.",
    )
    num_workers: int | None = Field(
        None,
        ge=1,
        description="local: worker processes. Default: one per GPU, or one on CPU; on GPUs a smaller number leaves "
        "some unused, and a larger one adds nothing. prefect: jobs that are sent at once; default all that can be, "
        "and workers take as many as their --limit.",
    )
    images_per_task: int = Field(
        5000,
        ge=1,
        description="Number of images that one task generates, turns into features or encodes, in whole batches; of "
        "captions, where it embeds them.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is one.")
