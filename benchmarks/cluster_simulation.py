"""How a run scales, simulated: trainings on many GPUs, checkpoints, the merge, the images. No measurement.

A training takes ``num_processes`` GPUs of one machine, as `deme_core.data_parallel` does; the copies and the control
start together, and the control takes as many steps as all copies. What a machine's memory or disk cannot hold is said
so, and the simulation goes on as if it could.
"""

import heapq
import math
from dataclasses import dataclass

from deme_core.cost_estimate import H100_PEAK, UTILIZATION
from deme_core.rows import NUM_ROWS

_FP32 = 4  # Bytes.
# Weights, gradients, two moments, their average, and the frozen model.
_STATES = 6
# Weights, their average, two moments.
_SAVED = 4
_PASSES_OF_A_STEP = 4  # Forward, twice as much backward, and the frozen model.


@dataclass(frozen=True)
class Cluster:
    """Machines. The defaults are assumptions about a cluster of H100s, and no measurements.

    Attributes:
        num_gpus: in all.
        gpus_per_machine: of one machine, and so the largest ``num_processes``.
        rate: operations per second of one GPU in training.
        image_rate: in generating images, which DeMe does in fp32.
        gpu_bytes: memory of one GPU.
        disk_bytes: of one machine.
        stream_rate: bytes per second that one machine reads or writes, digests included.
        store_rate: bytes per second of the store, all machines together.
        link_rate: bytes per second between the GPUs of one machine.
        jobs_at_once: jobs that a flow has under way.
        seconds_per_job: start of a process, imports, Prefect.
    """

    num_gpus: int
    gpus_per_machine: int = 8
    rate: float = UTILIZATION * H100_PEAK["bf16"]
    image_rate: float = UTILIZATION * H100_PEAK["fp32"]
    gpu_bytes: float = 80e9
    disk_bytes: float = 4e12
    stream_rate: float = 1e9
    store_rate: float = 100e9
    link_rate: float = 200e9
    jobs_at_once: int = 256
    seconds_per_job: float = 20.0


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        num_segments: N.
        num_parameters: of the denoiser.
        forward_flops: of one image.
        num_steps: optimizer steps of each copy; the control takes N times as many.
        batch_size: images per step, of all processes of a training together.
        num_processes: GPUs of each training.
        checkpoint_every: steps.
        num_images: of each row and seed.
        num_seeds: of the report.
        num_inference_steps: per image.
        images_per_task: of one job.
        has_control: whether the equal-compute control is trained.
    """

    num_segments: int
    num_parameters: float
    forward_flops: float
    num_steps: int = 5000
    batch_size: int = 256
    num_processes: int = 8
    checkpoint_every: int = 1000
    num_images: int = 50_000
    num_seeds: int = 3
    num_inference_steps: int = 50
    images_per_task: int = 1000
    has_control: bool = True


@dataclass(frozen=True)
class Simulated:
    """What came out of it.

    Attributes:
        training_sec: until the last copy, and the control, is there.
        merge_sec: two merges side by side, of all copies and of the control.
        images_sec: of all rows and seeds.
        busy: share of the GPUs' time that was computed in.
        checkpoint_share: share of a training's time that it waits for its checkpoints.
        limits: what does not fit, in sentences.
    """

    training_sec: float
    merge_sec: float
    images_sec: float
    busy: float
    checkpoint_share: float
    limits: tuple[str, ...]

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return (self.training_sec + self.merge_sec + self.images_sec) / 3600


def simulate(plan: Plan, cluster: Cluster) -> Simulated:
    """Returns how long a run takes, and what it breaks."""
    model = _FP32 * plan.num_parameters
    num_at_once = max(min(cluster.num_gpus // plan.num_processes, cluster.jobs_at_once), 1)
    trainings = [plan.num_steps] * plan.num_segments + [plan.num_steps * plan.num_segments] * plan.has_control
    step = _step_seconds(plan, cluster)
    stream = min(cluster.stream_rate, cluster.store_rate / min(num_at_once, len(trainings)))
    saving = _SAVED * model / stream
    seconds = [
        cluster.seconds_per_job
        + (model + model) / stream
        + steps * step
        + (steps - 1) // plan.checkpoint_every * saving
        for steps in trainings
    ]
    training = _last(seconds, num_at_once)
    merge = cluster.seconds_per_job + (plan.num_segments + 2) * model / cluster.stream_rate
    images, image_gpu_seconds = _images(plan, cluster)
    total = training + merge + images
    computed = sum(trainings) * step * plan.num_processes + image_gpu_seconds
    share = saving / (saving + plan.checkpoint_every * step)
    return Simulated(
        training, merge, images, computed / (total * cluster.num_gpus), share, _limits(plan, cluster, model)
    )


def knee(plan: Plan, gpus_per_machine: int = 8) -> int:
    """Returns from how many GPUs on more of them train no faster.

    The control takes as long as all copies one after the other: while it is trained on its ``num_processes`` GPUs, as
    many more train all copies.
    """
    per_training = min(plan.num_processes, gpus_per_machine)
    return per_training * (2 if plan.has_control else plan.num_segments)


def _step_seconds(plan: Plan, cluster: Cluster) -> float:
    compute = plan.batch_size * _PASSES_OF_A_STEP * plan.forward_flops / (plan.num_processes * cluster.rate)
    # A ring moves the gradients about twice; overlap with the backward pass is not counted on.
    share = (plan.num_processes - 1) / plan.num_processes
    return compute + 2 * share * _FP32 * plan.num_parameters / cluster.link_rate


def _images(plan: Plan, cluster: Cluster) -> tuple[float, float]:
    """Returns the time of all rows' images, and the GPU time that was computed in; a job takes one GPU."""
    model = _FP32 * plan.num_parameters
    slices = math.ceil(plan.num_images / plan.images_per_task) * plan.num_seeds
    num_at_once = min(cluster.num_gpus, cluster.jobs_at_once)
    stream = min(cluster.stream_rate, cluster.store_rate / num_at_once)
    compute = plan.images_per_task * plan.num_inference_steps * plan.forward_flops / cluster.image_rate
    one = cluster.seconds_per_job + model / stream + compute
    # Each machine brings the ensemble's copies once, not each job.
    machines = math.ceil(num_at_once / cluster.gpus_per_machine)
    ensemble = plan.num_segments * model / min(cluster.stream_rate, cluster.store_rate / machines)
    return _last([one] * slices * NUM_ROWS, num_at_once) + ensemble, slices * NUM_ROWS * compute


def _last(seconds: list[float], num_at_once: int) -> float:
    """Returns when the last of some jobs ends, the longest begun first, so many at once."""
    ends = [0.0] * min(num_at_once, len(seconds))
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def _limits(plan: Plan, cluster: Cluster, model: float) -> tuple[str, ...]:
    found = []
    if plan.num_processes > cluster.gpus_per_machine:
        found.append(f"a training on {plan.num_processes} GPUs needs several machines, and DeMe takes one")
    if (needed := _STATES * model) > cluster.gpu_bytes:
        found.append(
            f"a training needs {needed / 1e9:,.0f} GB of memory on each GPU, which has {cluster.gpu_bytes / 1e9:,.0f}"
        )
    if model > cluster.gpu_bytes:
        found.append(f"the model in fp32, {model / 1e9:,.0f} GB, does not fit a GPU")
    if (needed := (plan.num_segments + 2) * model) > cluster.disk_bytes:
        found.append(f"a merge reads {needed / 1e12:,.1f} TB onto a disk of {cluster.disk_bytes / 1e12:,.1f}")
    return tuple(found)
