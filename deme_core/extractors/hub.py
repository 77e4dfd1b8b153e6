"""Weights from the hub: files that its client has cached, or downloads, with a bound on the wait for an answer."""

from collections.abc import Sequence
from pathlib import Path

from deme_core.errors import first_line
from deme_core.extractors.base import unavailable

# The client tries each of the hub's addresses, so that this may pass a few times; downloading itself has no limit.
_ANSWER_TIMEOUT_SEC = 5.0


def hub_folder(repo_id: str, names: Sequence[str], mend: str, revisions: Sequence[str] = ("main",)) -> Path:
    """The folder in the hub client's cache that holds these files of a repository.

    Args:
        repo_id: the repository.
        names: of its files.
        mend: what a user can do without the hub.
        revisions: the first that has all the files is taken.

    Raises:
        ExtractorUnavailableError: none has, or there is no hub, which takes some 30 seconds.
    """
    for revision in revisions:
        if folder := _cached_folder(repo_id, names, revision):
            return folder
    try:
        return _downloaded_folder(repo_id, names, revisions)
    except Exception as error:  # the hub client raises HTTP, cache, validation and OS errors of many kinds
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise unavailable(f"{repo_id} cannot be had from the hub ({reason})", mend) from error


def _cached_folder(repo_id: str, names: Sequence[str], revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(repo_id, name, revision=revision) for name in names]
    files = [Path(path) for path in paths if isinstance(path, str)]
    return files[0].parent if len(files) == len(names) else None


def _downloaded_folder(repo_id: str, names: Sequence[str], revisions: Sequence[str]) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    for number, revision in enumerate(revisions, start=1):
        try:
            # Asked first and once: the download itself would ask a hub that does not answer six times over.
            for name in names:
                get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision), timeout=_ANSWER_TIMEOUT_SEC)
        except EntryNotFoundError:
            if number == len(revisions):
                raise
            continue
        break
    paths = [Path(hf_hub_download(repo_id, name, revision=revision)) for name in names]
    return paths[0].parent
