"""The held-out loss of one candidate of a search, by segment: a proxy of its score that needs no image."""

import itertools
from pathlib import Path

import numpy as np

from deme_core.binned_losses import bin_edges, bin_shares
from deme_core.heldout_loss import check_finite, heldout_losses
from tasks.jobs import LossJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.live_model import live_merge, merge_inputs
from tasks.work.scoring import adapter_of

# Other noise than the report's held-out loss has.
_SEED = 1


def identity(job: LossJob, context: JobContext) -> Identity:
    """Models, weights, images and segments."""
    inputs, merge = merge_inputs(job)
    return Identity(
        settings={"kind": "loss", "segment_edges": list(job.segment_edges)} | merge,
        inputs=inputs,
        dataset=context.heldout_images(job.dataset).example_fingerprint,
    )


def run(job: LossJob, context: JobContext, out: Path, digest: str) -> Work:
    """Returns the mean loss in each segment; None if one is not finite, which the pretrained model's must be."""
    yield {"message": "measuring the held-out loss"}
    folder, merge = live_merge(job, context)
    edges = bin_edges(folder.num_train_timesteps, job.segment_edges)
    losses = heldout_losses(
        merge.model,
        adapter_of(folder, context),
        context.heldout_images(job.dataset),
        edges=edges,
        seed=_SEED,
        device=context.device,
    )
    weighted = bin_shares(edges) * losses.mean(axis=0, dtype=np.float64)
    segments = itertools.pairwise(job.segment_edges)
    lows = np.array(edges[:-1])
    by_segment = [float(weighted[(low <= lows) & (lows < high)].sum()) for low, high in segments]
    if not any(job.weights):
        check_finite(losses, "the pretrained model")
    return {"value": by_segment if np.isfinite(by_segment).all() else None}
