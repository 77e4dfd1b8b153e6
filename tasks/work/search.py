"""What a search is about: its digest, and how many weights there are to find.

The search itself runs in the flow process (`tasks.weight_search`), which cannot look into models or data sets.
"""

from pathlib import Path

from deme_core.merge_methods.build import num_weights
from deme_core.model_folder import open_model_folder
from tasks.jobs import SearchJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.score import candidate_settings


def identity(job: SearchJob, context: JobContext) -> Identity:
    """Models, real images, strategy and sampling; the report's seeds and counts are no part of it."""
    inputs = {"pretrained": job.pretrained.digest, "reference": job.reference.digest}
    inputs |= {f"expert-{index}": expert.digest for index, expert in enumerate(job.experts)}
    return Identity(
        settings={
            "search": job.search.model_dump(mode="json", exclude={"num_reference_images"}),
            "evaluate": candidate_settings(job.evaluate, context),
            "segment_edges": list(job.segment_edges),
            "is_control": job.is_control,
            "merge": job.method.settings(),
        },
        inputs=inputs,
        dataset=context.heldout_images(job.dataset).example_fingerprint,
    )


def run(job: SearchJob, context: JobContext, out: Path, digest: str) -> Work:
    """Counts the weights."""
    yield {"message": "reading the models"}
    names = list(open_model_folder(context.fetch(job.pretrained)).checkpoint().infos)
    return {"num_weights": num_weights(job.method, len(job.experts), names)}
