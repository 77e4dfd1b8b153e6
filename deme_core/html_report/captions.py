"""What stands under the scores: which intervals there are, and which of them decide."""

from deme_core.extractor_names import EXTRACTOR_NAMES
from deme_core.html_report.content import Scores
from deme_core.metrics import metric_names

_KERNEL_DISTANCES = frozenset(metric_names(["kid"], EXTRACTOR_NAMES))
_SEEDS_DECIDE = "the seeds alone decide, and a difference counts as better or worse if its interval excludes zero."


def scores_caption(scores: Scores) -> str:
    """Returns what the marks of the chart are, and, where there are verdicts, how they come about."""
    parts = ["Diamond and line: mean and 95 % Student interval over sampling seeds."]
    if scores.is_resampled:
        parts.append(_wide_bar(scores))
    parts.append("Points: single seeds.")
    if scores.deciding:
        parts.append(_rule(scores))
    return " ".join(parts)


def _wide_bar(scores: Scores) -> str:
    images = "the images, generated and real" if scores.draws_real_images else "the generated images alone"
    subsets = (
        ", but not over the random subsets of a kernel distance, whose luck is in the interval over seeds"
        if scores.metric in _KERNEL_DISTANCES
        else ""
    )
    return f"Wide bar: 95 % bootstrap over {images}{subsets}."


def _rule(scores: Scores) -> str:
    of_seeds = [d for d in scores.deciding if d.images is None and not scores.lacks_images(d)]
    if len(of_seeds) == len(scores.deciding):
        return f"The images were not resampled: {_SEEDS_DECIDE}"
    both = "A difference counts as better or worse only if both of its intervals exclude zero."
    return f"{both} Where neither of two was resampled, {_SEEDS_DECIDE}" if of_seeds else both
