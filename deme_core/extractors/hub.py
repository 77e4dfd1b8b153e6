"""Weights from the hub: files that its client has cached, or downloads, with a bound on the wait for an answer."""

from collections.abc import Sequence
from pathlib import Path

from deme_core.extractors.base import unavailable

# The client tries each of the hub's addresses, so that this may pass a few times; downloading itself has no limit.
_ANSWER_TIMEOUT_SEC = 5.0


def hub_folder(repo_id: str, names: Sequence[str], mend: str) -> Path:
    """The folder in the hub client's cache that holds these files of a repository.

    A network without the hub is an ExtractorUnavailableError within some 30 seconds.
    """
    try:
        paths = [_hub_file(repo_id, name) for name in names]
    except Exception as error:  # the hub client raises HTTP, cache, validation and OS errors of many kinds
        reason = (str(error).splitlines() or [""])[0].rstrip(". ")
        raise unavailable(f"{repo_id} cannot be had from the hub ({type(error).__name__}: {reason})", mend) from error
    return paths[0].parent


def _hub_file(repo_id: str, name: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, name)
    if isinstance(cached, str):
        return Path(cached)
    # Asked first and once: the download itself would ask a hub that does not answer six times over.
    get_hf_file_metadata(hf_hub_url(repo_id, name), timeout=_ANSWER_TIMEOUT_SEC)
    return Path(hf_hub_download(repo_id, name))
